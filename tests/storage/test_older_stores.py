"""A store that an older release wrote still serves pull, promote, rollback and a new plan's questions.

The documents below are literal JSON, written by the release before identifiers were renamed. Their field names are the
format of every store in use. A renamed field fails here, even where all code was renamed with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from qlora_retrain.core import hashing
from qlora_retrain.evaluation import drift
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, pull, registry, rejections
from qlora_retrain.storage.artifact import Manifest
from qlora_retrain.storage.registry import Alias, Release
from qlora_retrain.storage.store import Store

FIRST, SECOND = "20260101T000000Z-d6b1c7499c6e", "20260108T000000Z-89dc7491bfe4"
PROFILE = '{"distributions": {"label": {"refund": 3, "login": 2}}}\n'
FILES = {
    FIRST: {"adapter/adapter_model.safetensors": "first adapter\n", "model/model.safetensors": "first model\n"},
    SECOND: {"adapter/adapter_model.safetensors": "second adapter\n", "model/model.safetensors": "second model\n"},
}


def release_document(version: str, content_hash: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    stamp = version.partition("-")[0]
    return {
        "schema_version": 1,
        "line": "tickets",
        "version": version,
        "content_hash": content_hash,
        "created_at": stamp,
        "files": files,
        "adapter_key": "a" * 64,
        "judgement": "b" * 64,
        "anchor": version,
        "keys": {"validate_data": "c" * 64, "train_qlora": "a" * 64},
        "base": {"files": {"model.safetensors": "sha256:" + "d" * 64}},
        "numbers": {"adapter": {"steps": 3}, "model": {"best": "challenger"}},
        "provenance": {"run_id": f"{stamp}-0123456789ab", "steps": {}},
    }


RELEASES = {
    FIRST: release_document(
        FIRST,
        "d6b1c7499c6e99d2842d93cffaad14aaa67886d9283b2c6f682ea89f7423045a",
        [
            {
                "path": "adapter/adapter_model.safetensors",
                "size_bytes": 14,
                "sha256": "c4f9dc48b5e55a82329824b7719270d739c2e8c1e95663be33b5fa154faa5236",
            },
            {
                "path": "data/profile.json",
                "size_bytes": 56,
                "sha256": "73fa5031766f413f7d34bc68b431ce803d7184ab9407492c676a096b8c1b9302",
            },
            {
                "path": "model/model.safetensors",
                "size_bytes": 12,
                "sha256": "d1503d2ccfa26f59691f658e1cdfece81afe103aa7d209f7b070edb0861ea18d",
            },
        ],
    ),
    SECOND: release_document(
        SECOND,
        "89dc7491bfe4d0db14e6e57eaa8da768b8a3f109caaf7363b1867767ac402928",
        [
            {
                "path": "adapter/adapter_model.safetensors",
                "size_bytes": 15,
                "sha256": "dd4da158a93228861e67178bb1b0967a35033f856c2962fb491fe3f3abe2776e",
            },
            {
                "path": "data/profile.json",
                "size_bytes": 56,
                "sha256": "73fa5031766f413f7d34bc68b431ce803d7184ab9407492c676a096b8c1b9302",
            },
            {
                "path": "model/model.safetensors",
                "size_bytes": 13,
                "sha256": "52fb4dd27082039cfefd7cc348b9cc0220587668fe70c86c9bde8b606058d439",
            },
        ],
    ),
}
# The hash of each manifest's bytes as the older release wrote them, from its own alias.
MANIFEST_SHA256 = {
    FIRST: "306ef86ac66d5a32c5e751f3b5f5b3b1a37c487c49fd06377ab451e101acaffc",
    SECOND: "cb67a16c9a220079f2dafe3842927080144b58273f0dc402a543d979629b24c2",
}
PRODUCTION = {
    "version": SECOND,
    "manifest_sha256": MANIFEST_SHA256[SECOND],
    "generation": 2,
    "moves": [{"version": FIRST, "generation": 1, "at": "2026-01-01T09:05:26+00:00"}],
    "rejected": [],
    "request_id": "d784136b669c",
    "reason": "passed both gates",
    "actor": "airflow@worker",
    "at": "2026-01-08T09:05:26+00:00",
}
ARTIFACT = {
    "schema_version": 1,
    "artifact": "dataset",
    "key": "c" * 64,
    "step": "validate_data",
    "attempt": "0123456789ab",
    "outcome": "done",
    "exit_code": 0,
    "reason": None,
    "numbers": {"rows_train": 27, "seconds": 1.5},
    "files": [{"path": "train.jsonl", "size_bytes": 3, "sha256": "e" * 64}],
    "inputs": {"raw_data": "f" * 64, "golden_data": None},
    "read": {"base_nf4": "1" * 64},
    "config": {"task": "labels"},
    "code": "2" * 64,
    "provenance": {"host": "worker"},
}
PINNED_SOURCE = {
    "uri": "file:///data",
    "files": [{"path": "t.jsonl", "size_bytes": 88, "pin": "sha256:" + "3" * 64}],
    "patterns": ["**"],
}
PINNED_VERSION = {"version": SECOND, "manifest_sha256": MANIFEST_SHA256[SECOND], "content_hash": "4" * 64}
PLAN = {
    "schema_version": 1,
    "run_id": "20260115T000000Z-81f87809beb5",
    "created_at": "20260115T000000Z",
    "root": "filled in by the test",
    "line": "tickets",
    "sources": {"raw_data": PINNED_SOURCE, "base_model": PINNED_SOURCE, "golden_data": None, "reference_data": None},
    "champion": PINNED_VERSION,
    "anchor": PINNED_VERSION,
    "reference": PINNED_VERSION,
    "target": SECOND,
    "judgement": "5" * 64,
    "unchanged": None,
    "choices": [{"field": "train.device", "value": "cpu", "reason": "no NVIDIA driver where the plan was made"}],
    "steps": [
        {
            "name": "quantize_model",
            "config": {"quant_type": "nf4"},
            "identity": {"quant_type": "nf4"},
            "inputs": {"base_model": "6" * 64},
            "code": "7" * 64,
            "key": "8" * 64,
        }
    ],
}
# What an earlier pull of the older release left in its destination.
PULLED = {
    "line": "tickets",
    "alias": "production",
    "version": SECOND,
    "generation": 2,
    "manifest_sha256": MANIFEST_SHA256[SECOND],
    "seen": {"tickets@production": [2, SECOND]},
}


def to_bytes(document: dict[str, Any]) -> bytes:
    """The document as the older release wrote it: pydantic's JSON with an indent of 1 is that of the json module."""
    return json.dumps(document, indent=1).encode()


@pytest.fixture
def older(store: Store) -> Store:
    """The store of the older release: two versions, `production` at the second one, `latest` too."""
    for version, document in RELEASES.items():
        folder = f"models/tickets/versions/{version}"
        for path, text in {**FILES[version], "data/profile.json": PROFILE}.items():
            store.write_if_absent(f"{folder}/{path}", text.encode())
        store.write_if_absent(f"{folder}/manifest.json", to_bytes(document))
    for name, request_id in (("production", "d784136b669c"), ("latest", "9fb41a903dc6")):
        store.write_if_absent(f"models/tickets/aliases/{name}.json", to_bytes({**PRODUCTION, "request_id": request_id}))
    return store


def test_the_literal_manifests_are_byte_for_byte_those_of_the_older_release() -> None:
    for version, document in RELEASES.items():
        assert hashing.sha256_bytes(to_bytes(document)) == MANIFEST_SHA256[version]


def test_a_pull_gets_every_byte_of_the_older_version(older: Store, tmp_path: Path) -> None:
    release = pull.pull(older, "tickets@production", tmp_path / "model")
    assert release.version == SECOND
    for path, text in {**FILES[SECOND], "data/profile.json": PROFILE}.items():
        assert (tmp_path / "model" / path).read_text() == text
    record = json.loads((tmp_path / "model" / "_pulled.json").read_text())
    manifests = {f"tickets {SECOND}": MANIFEST_SHA256[SECOND]}
    assert record == {**PULLED, "signer": None, "signers": {}, "manifests": manifests, "parts": []}


def test_a_pull_knows_what_the_older_release_pulled_before(older: Store, tmp_path: Path) -> None:
    destination = tmp_path / "model"
    destination.mkdir()
    (destination / "_pulled.json").write_text(json.dumps(PULLED, indent=1) + "\n")
    assert pull.pull(older, "tickets@production", destination).version == SECOND
    assert (destination / "model" / "model.safetensors").read_text() == "second model\n"


def test_an_older_version_can_be_promoted_and_the_next_state_keeps_the_older_one(older: Store) -> None:
    release = registry.read_release(older, "tickets", FIRST)
    registry.move_alias(older, "tickets", "production", release, reason="by hand")
    document = json.loads(older.read("models/tickets/aliases/production.json").data)

    assert document.keys() == PRODUCTION.keys() | {"action"}
    assert (document["version"], document["manifest_sha256"]) == (FIRST, MANIFEST_SHA256[FIRST])
    assert document["generation"] == 3
    assert document["moves"] == [
        *PRODUCTION["moves"],  # type: ignore[misc]
        {
            "version": SECOND,
            "generation": 2,
            "at": "2026-01-08T09:05:26+00:00",
            "manifest_sha256": MANIFEST_SHA256[SECOND],
        },
    ]


def test_a_rollback_goes_back_to_the_older_version_and_rejects_the_newer_content(older: Store) -> None:
    registry.rollback(older, "tickets", "production", reason="worse in use")
    document = json.loads(older.read("models/tickets/aliases/production.json").data)
    assert (document["version"], document["generation"]) == (FIRST, 3)
    assert document["rejected"] == [RELEASES[SECOND]["content_hash"]]
    audit = [path for path in older.children("models/tickets/audit") if "-production-" in path]
    assert [path[:8] for path in audit] == ["00000002", "00000003"]


def test_who_rejected_a_version_is_read_from_the_trail_of_an_older_release(older: Store) -> None:
    state = registry.rollback(older, "tickets", "production", reason="worse in use")
    # As an older release wrote it.
    entry = state.model_copy(update={"rejections": (), "action": None, "signature": None})
    path = "models/tickets/audit/00000003-production-" + state.request_id + ".json"
    older.delete([path])
    older.write_if_absent(path, entry.model_dump_json().encode())
    (rejection,) = rejections.of_alias(older, "tickets", "production", entry)
    assert (rejection.version, rejection.reason, rejection.actor) == (SECOND, "worse in use", state.actor)


def test_the_content_of_an_older_version_is_found_again(older: Store) -> None:
    release = registry.find_by_content(older, "tickets", RELEASES[FIRST]["content_hash"])
    assert release is not None
    assert release.version == FIRST


def test_drift_is_computed_from_the_data_profile_of_an_older_version(older: Store, tmp_path: Path) -> None:
    older.download(f"models/tickets/versions/{FIRST}", ["data/profile.json"], tmp_path)
    distributions = drift.read_distributions(tmp_path / "data/profile.json")
    assert distributions is not None
    assert distributions["label"] == {"refund": 3, "login": 2}


def test_an_artifact_of_the_older_release_is_found_by_its_key(store: Store) -> None:
    store.write_if_absent(f"artifacts/dataset/{'c' * 64}/_manifest.json", to_bytes(ARTIFACT))
    store.write_if_absent(f"artifacts/dataset/{'c' * 64}/0123456789ab/train.jsonl", b"{}\n")
    manifest = artifact.find_manifest(store, "dataset", "c" * 64)
    assert manifest is not None
    artifact.check_files(store, manifest)


def test_a_plan_of_the_older_release_is_read(store: Store) -> None:
    document = {**PLAN, "root": store.uri}
    path = f"runs/{PLAN['run_id']}/plan.json"
    store.write_if_absent(path, to_bytes(document))
    plan = Plan.read(f"{store.uri}/{path}")
    assert json.loads(plan.model_dump_json()) == document


@pytest.mark.parametrize(
    ("model", "document"),
    [(Release, RELEASES[FIRST]), (Alias, PRODUCTION), (Manifest, ARTIFACT), (Plan, PLAN)],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_field_of_an_older_document_has_its_name_and_place_today(
    model: type[BaseModel], document: dict[str, Any]
) -> None:
    """A field that was renamed would be lost in silence where its successor has a default."""
    assert contains(json.loads(model.model_validate(document).model_dump_json()), document)


def contains(today: Any, older: Any) -> bool:
    """Return whether today's document has everything of the older one; new fields may stand beside it."""
    if isinstance(older, dict):
        return isinstance(today, dict) and all(key in today and contains(today[key], older[key]) for key in older)
    if isinstance(older, list):
        return len(today) == len(older) and all(map(contains, today, older))
    return bool(today == older)
