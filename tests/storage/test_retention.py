"""Retention: in a bucket with object lock nobody deletes a version for some days; elsewhere it has no effect.

moto never compares a retention with an earlier one, so a handler gives S3's answer to a shorter one.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage import open_store
from qlora_retrain.storage.retention import retain
from qlora_retrain.storage.s3 import S3Store

PATHS = ["models/x/versions/v/manifest.json", "models/x/versions/v/model/model.safetensors"]


@pytest.fixture
def locked(s3_server: str) -> S3Store:
    """A store in a bucket that was made with object lock."""
    bucket = f"locked-{uuid.uuid4().hex[:8]}"
    store = S3Store(f"s3://{bucket}/qlora")
    store.client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    for path in PATHS:
        store.write_if_absent(path, b"x")
    return store


def at(store: S3Store, path: str) -> dict[str, str]:
    return {"Bucket": store.uri.split("/")[2], "Key": f"qlora/{path}"}


def test_a_retained_version_cannot_be_deleted_for_that_long_and_an_alias_can_still_move(locked: S3Store) -> None:
    state = locked.write_if_absent("models/x/aliases/production.json", b"1")
    before = datetime.now(UTC)
    assert retain(locked, PATHS, 14) is True
    for path in PATHS:
        head = locked.client.head_object(**at(locked, path))
        assert head["ObjectLockMode"] == "GOVERNANCE"
        difference = head["ObjectLockRetainUntilDate"] - before - timedelta(days=14)
        assert abs(difference) < timedelta(minutes=1)
        with pytest.raises(ClientError, match="AccessDenied"):
            locked.client.delete_object(**at(locked, path), VersionId=head["VersionId"])
    locked.swap("models/x/aliases/production.json", b"2", state)


def test_zero_days_a_folder_and_a_bucket_without_object_lock_retain_nothing(tmp_path: Path, s3_uri: str) -> None:
    folder = open_store(tmp_path.as_uri())
    folder.write_if_absent(PATHS[0], b"x")
    assert retain(folder, PATHS[:1], 14) is False

    store = S3Store(s3_uri)
    for path in PATHS:
        store.write_if_absent(path, b"x")
    requests: list[Any] = []
    store.client.meta.events.register("before-send.s3.PutObjectRetention", lambda **request: requests.append(request))
    assert retain(store, PATHS, 0) is False
    assert requests == []
    assert retain(store, PATHS, 14) is False
    assert len(requests) == 1


def test_a_longer_retention_of_before_stays_and_a_missing_permission_is_an_error(locked: S3Store) -> None:
    def refuse(**_: Any) -> None:
        raise ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "PutObjectRetention")

    retain(locked, PATHS, 20)
    locked.client.meta.events.register_first("before-send.s3.PutObjectRetention", refuse)
    assert retain(locked, PATHS, 14) is True
    with pytest.raises(UsageError, match=r"cannot retain .*AccessDenied"):
        retain(locked, PATHS, 25)
