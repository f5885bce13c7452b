"""Policies of AWS for a line's roles and for the store's bucket, rendered from `access.py`.

A role's policy is what `aws iam put-role-policy` and Terraform take. Roles are shared by lines, except that of
`publish`: a role has one policy for each line, and their permissions add up.

Command: `qlora-retrain policy CONFIG --root s3://bucket/prefix [--role NAME]`
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from qlora_retrain.config.line import LineConfig
from qlora_retrain.core import uris
from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline.access import Access, access
from qlora_retrain.pipeline.plan import run_id
from qlora_retrain.storage.collection_mark import MARK_PATH

Document = dict[str, Any]
_VERSION = "2012-10-17"
_ROLE_MARK = "{role}"
# Run ids and the names of versions are of one length, so that a pattern names exactly one folder.
_STAMPED = "?" * len(run_id(datetime.now(UTC)))
_KEY = "?" * 64


def role_policy(config: LineConfig, role: str, root: str, kms: str | None = None) -> Document:
    """Render what a role may do.

    Args:
        config: The line.
        role: One of `access.roles`.
        root: The store, `s3://bucket/prefix`.
        kms: The ARN of the KMS key that the role signs with: a key's, or an alias's. `{role}` stands for the role.

    Raises:
        UsageError: If there is no such role, the store is not in S3, or the ARN is none of KMS.
    """
    rights, store = access(config, role), _arn_of(root)
    statements = _store_statements(rights, store) + _source_statements(rights)
    if kms is not None and rights.signs:
        statements.append(_signing_statement(kms.replace(_ROLE_MARK, role.replace(".", "-"))))
    return {"Version": _VERSION, "Statement": statements}


def bucket_policy(root: str) -> Document:
    """Render the bucket's own policy, which holds for every role: what is written once is never overwritten.

    Raises:
        UsageError: If the store is not in S3.
    """
    store = _arn_of(root)
    written_once = (
        f"artifacts/*/{_KEY}/_manifest.json",
        f"models/*/versions/{_STAMPED}/manifest.json",
        "models/*/audit/*",
        "histories/*",
        f"runs/{_STAMPED}/plan.json",
    )
    # The parts of an upload have no such header, only the request that makes an object of them.
    creates = {"Bool": {"s3:ObjectCreationOperation": "true"}}
    unconditional = {"Null": {"s3:if-none-match": "true"}, **creates}
    # An alias moves with If-Match, and begins with If-None-Match. So does the mark of a collection.
    blind = {"Null": {"s3:if-none-match": "true", "s3:if-match": "true"}, **creates}
    everybody = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject"}
    return {
        "Version": _VERSION,
        "Statement": [
            {"Sid": "WrittenOnce", **everybody, "Resource": _below(store, written_once), "Condition": unconditional},
            {
                "Sid": "Compared",
                **everybody,
                "Resource": _below(store, ["models/*/aliases/*", MARK_PATH]),
                "Condition": blind,
            },
        ],
    }


def _store_statements(rights: Access, store: str) -> list[Document]:
    bucket, _, prefix = store.partition("/")
    listed = [f"{prefix}/{pattern}" if prefix else pattern for pattern in (*rights.reads, *rights.lists)]
    statements = [_listing(bucket, listed)]
    for sid, actions, patterns in (
        ("Read", ["s3:GetObject"], rights.reads),
        ("Write", ["s3:PutObject", "s3:AbortMultipartUpload"], rights.writes),
        ("Delete", ["s3:DeleteObject"], rights.deletes),
        ("Retain", ["s3:PutObjectRetention", "s3:GetObjectRetention"], rights.retains),
    ):
        if patterns:
            statements.append({"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": _below(store, patterns)})
    if rights.aborts:
        # These have no prefix by which they could be narrowed to the store.
        uploads = ["s3:ListBucketMultipartUploads"]
        statements.append({"Sid": "Uploads", "Effect": "Allow", "Action": uploads, "Resource": [bucket]})
        abort = {"Sid": "Abort", "Effect": "Allow", "Action": ["s3:AbortMultipartUpload"]}
        statements.append({**abort, "Resource": _below(store, ["*"])})
    return statements


def _source_statements(rights: Access) -> list[Document]:
    """Render what a role may read outside of the store; only sources in S3 need a permission of AWS."""
    patterns = [uris.bucket_and_prefix(uri) for uri in rights.sources if uri.startswith("s3:")]
    statements = [
        _listing(f"arn:aws:s3:::{bucket}", [prefix for name, prefix in patterns if name == bucket], sid=f"Sources{i}")
        for i, bucket in enumerate(dict.fromkeys(bucket for bucket, _ in patterns))
    ]
    if patterns:
        actions = ["s3:GetObject", *(["s3:GetObjectVersion"] if rights.pins_sources else [])]
        resources = [f"arn:aws:s3:::{bucket}/{prefix}" for bucket, prefix in patterns]
        statements.append({"Sid": "ReadSources", "Effect": "Allow", "Action": actions, "Resource": resources})
    return statements


def _listing(bucket: str, patterns: Sequence[str], sid: str = "List") -> Document:
    # Without this permission S3 answers 403 for a file that is not there, and the pipeline needs its 404.
    return {
        "Sid": sid,
        "Effect": "Allow",
        "Action": ["s3:ListBucket"],
        "Resource": [bucket],
        "Condition": {"StringLike": {"s3:prefix": list(dict.fromkeys(patterns))}},
    }


def _signing_statement(arn: str) -> Document:
    """Render the permission to sign with one key."""
    head, _, name = arn.rpartition(":")
    if not arn.startswith("arn:") or ":kms:" not in arn or not name.startswith(("key/", "alias/")):
        raise UsageError(f"--kms {arn}: expected arn:aws:kms:REGION:ACCOUNT:key/ID, or :alias/NAME")
    statement = {"Sid": "Sign", "Effect": "Allow", "Action": ["kms:Sign"], "Resource": [arn]}
    if name.startswith("key/"):
        return statement
    # IAM knows keys alone as resources; an alias is a property of a key.
    named = {"ForAnyValue:StringEquals": {"kms:ResourceAliases": [name]}}
    return {**statement, "Resource": [f"{head}:key/*"], "Condition": named}


def _arn_of(root: str) -> str:
    """Return the ARN of the store's folder, without a slash at its end."""
    bucket, prefix = uris.bucket_and_prefix(uris.absolute(root))
    return f"arn:aws:s3:::{bucket}/{prefix}".rstrip("/")


def _below(store: str, patterns: Iterable[str]) -> list[str]:
    return [f"{store}/{pattern}" for pattern in patterns]
