"""Every error of a server that speaks S3, of boto3 and of the libraries below it, as one of ours: one table."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from qlora_retrain.core import uris
from qlora_retrain.core.errors import Cause, TryAgain, UsageError
from qlora_retrain.storage.store import CEPH_HINT, NotFound

# Temporary errors that may come without a 5xx status: in the answer to a batch, or as a 400.
TEMPORARY_CODES = (
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
)

# What a person does about a 403 that no permission cures.
_CREDENTIAL_HINTS = {
    "ExpiredToken": "the credentials of this process have expired: get new ones",
    "InvalidAccessKeyId": "the server does not know this access key: set the one of this store",
    "InvalidToken": "the session token is none of this access key: get new credentials",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
    "SignatureDoesNotMatch": "the secret key is none of this access key, or a proxy changed the request",
}
# What a role must be allowed for a request; a request that is not here has the permission of its own name.
_ACTIONS = {
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "CopyObject": "s3:PutObject, and s3:GetObject for what is copied",
    "UploadPartCopy": "s3:PutObject, and s3:GetObject for what is copied",
    "DeleteObjects": "s3:DeleteObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListParts": "s3:ListMultipartUploadParts",
}
# How S3 itself names the action that was refused, which may be one of another service, such as kms:Decrypt.
_REFUSED_ACTION = re.compile(r"is not authorized to perform: (\w+:\w+)")
# No room is left for this user or in this bucket: Ceph's answer, with a 403, and those of MinIO.
_FULL_CODES = ("QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull")
# What older servers answer to the checksums that boto3 sends in a trailer, or in the place of an MD5.
_CHECKSUM_CODES = ("MissingContentLength", "MissingContentMD5", "XAmzContentSHA256Mismatch")
_CHECKSUM_HINT = (
    "an older server does not understand the checksums that boto3 sends: set AWS_REQUEST_CHECKSUM_CALCULATION to "
    "when_required"
)
_NO_ANSWER_HINT = (
    "run the same command again; if that stays so, look whether the server runs and AWS_ENDPOINT_URL, if set, names it"
)
_REDIRECT_HINT = "as one of another region does: set AWS_REGION to the bucket's region, or correct AWS_ENDPOINT_URL"
# What every answer of S3 has, and that of a proxy lacks.
_FIELDS = ("ETag", "Body", "ContentLength", "ContentRange")


@contextlib.contextmanager
def translate_errors(where: str, no_bucket: Callable[[], bool]) -> Iterator[None]:
    """Translate the errors of boto3 and of the libraries below it into ours.

    Args:
        where: The beginning of the message, e.g. "cannot read s3://bucket/key".
        no_bucket: Returns whether the bucket is missing; called only where the server's answer leaves it open.
    """
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from s3transfer import exceptions as transfer

    failed_transfers = (transfer.S3UploadFailedError, transfer.S3DownloadFailedError, transfer.S3CopyFailedError)
    connection_errors = (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, boto.ChecksumError)
    try:
        yield
    except boto.ClientError as error:
        code, text = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
        # The answer to a HEAD has no body, so a missing key and a missing bucket are both a plain 404.
        if code == "404" and no_bucket():
            code = "NoSuchBucket"
        raise to_problem(where, code, text, http_status(error), error.operation_name) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
        raise UsageError(f"{where}: {_text(error)}; {hint}") from error
    except boto.SSLError as error:
        raise UsageError(f"{where}: {_text(error)}; AWS_CA_BUNDLE names the certificates to trust") from error
    except (*connection_errors, *failed_transfers, transfer.RetriesExceededError, transfer.CancelledError) as error:
        raise TryAgain(f"{where}: {_text(error)}; {_NO_ANSWER_HINT}", cause=Cause.THROTTLED) from error
    except KeyError as error:
        if error.args[0] not in _FIELDS:
            raise
        raise TryAgain(
            f"{where}: expected the answer of an S3 server, found one without {error.args[0]}; if that stays so, look "
            "whether AWS_ENDPOINT_URL names the server, and HTTPS_PROXY a proxy that lets it through",
            cause=Cause.THROTTLED,
        ) from error
    except RecursionError as error:
        # boto3 asks for a bucket's region after each redirect, and that request is redirected too.
        raise UsageError(f"{where}: the server redirects every request, {_REDIRECT_HINT}") from error
    except (boto.BotoCoreError, Boto3Error, transfer.S3ValidationError, ResponseParserError) as error:
        raise UsageError(f"{where}: {_text(error)}") from error


def _text(error: Exception) -> str:
    """Return a library's message without what the URL of the server or of a proxy may hold."""
    return uris.mask_secrets_of_errors(str(error))


def http_status(error: Any) -> int:
    """Return the HTTP status of a `ClientError`; 0 where there was none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def to_problem(where: str, code: str, text: str | None, http: int, operation: str) -> Exception:
    """Return the error of ours that a server's error means.

    Args:
        where: The beginning of the message.
        code: The server's code, or the HTTP status where it sent none.
        text: The server's own words.
        http: The HTTP status.
        operation: The request, by its name in S3's API.
    """
    # Ceph sends many errors without a text; others end it with a full stop.
    message = f"{where}: {code}: {text.rstrip('.')}" if text else f"{where}: {code}"
    if code == "NoSuchBucket":
        return UsageError(f"{message}; create the bucket, or correct the root's URI")
    if code in ("NoSuchKey", "404"):
        # A list of nothing is empty, and no error.
        is_list = operation.startswith("List")
        hint = "this is no answer of S3 to a list: look whether AWS_ENDPOINT_URL, if set, names the server"
        return UsageError(f"{message}; {hint}") if is_list else NotFound(where)
    if http in (301, 307, 308):
        return UsageError(f"{message}; the server redirects, {_REDIRECT_HINT}")
    if code in _CREDENTIAL_HINTS:
        return UsageError(f"{message}; {_CREDENTIAL_HINTS[code]}")
    if code in _CHECKSUM_CODES or "Content-MD5" in (text or ""):
        return UsageError(f"{message}; {_CHECKSUM_HINT}")
    if code in _FULL_CODES:
        remedy = "make room, e.g. with `qlora-retrain gc --delete`, or raise the quota; then run the same command again"
        return TryAgain(f"{message}; the store is full: {remedy}", cause=Cause.DISK_FULL)
    if http == 403 or code == "AccessDenied":
        return UsageError(f"{message}; {_permission_hint(text or '', operation)}")
    if http == 501 or code == "NotImplemented":
        return UsageError(f"{message}; this server lacks a request that a store needs; use another server or a folder")
    if http == 412 and operation in ("CopyObject", "UploadPartCopy"):
        hint = "a copy is refused under the condition that its source has the ETag that the server itself says"
        return UsageError(f"{message}; {hint}: use another server or a folder")
    if http in (409, 412, 429) or http >= 500 or code in TEMPORARY_CODES:
        return TryAgain(f"{message}; run the same command again", cause=Cause.THROTTLED)
    return UsageError(message)


def _permission_hint(text: str, operation: str) -> str:
    """Return what a person does about a 403: which permission is missing."""
    named = _REFUSED_ACTION.search(text)
    action = named[1] if named else _ACTIONS.get(operation, f"s3:{operation}")
    hint = f"give this role the permission {action}, and look whether a policy of the bucket or of its key denies it"
    # So that nobody can probe for keys.
    is_read = action == "s3:GetObject"
    return f"{hint} (S3 says so of a missing file too, where s3:ListBucket is not allowed)" if is_read else hint


def wrong_precondition(where: str, tag: str | None) -> UsageError:
    """Return the error for a server that refuses a write under a condition that holds."""
    return UsageError(
        f"{where}: this server answers 412 to a write under the condition that the ETag is {tag}, and then says itself "
        "that this is the ETag; without a working If-Match no alias can move safely: use a server that honours it "
        f"{CEPH_HINT}, or a folder"
    )
