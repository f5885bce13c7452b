"""What a server that speaks S3, boto3 and what is below it can answer, as our own errors: one table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.storage.store import NotFound

# Temporary errors that may come without a 5xx status: in the answer to a batch, or as a 400.
AGAIN = ("InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException")


@contextlib.contextmanager
def said(where: str, no_bucket: Callable[[], bool]) -> Iterator[None]:
    """Say in our words what boto3 and what is below it say.

    Args:
        where: What cannot be done, as a message begins.
        no_bucket: Whether the bucket is missing; asked where the server's answer leaves it open.
    """
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from s3transfer import exceptions as transfer

    failed = (transfer.S3UploadFailedError, transfer.S3DownloadFailedError, transfer.S3CopyFailedError)
    again = (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, boto.ChecksumError)
    try:
        yield
    except boto.ClientError as error:
        code, text = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
        if code == "404" and no_bucket():  # the answer to a HEAD has no body to tell the two apart
            code = "NoSuchBucket"
        raise ended(where, code, text, status(error)) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
        raise UsageError(f"{where}: {error}; {hint}") from error
    except boto.SSLError as error:
        raise UsageError(f"{where}: {error}; AWS_CA_BUNDLE names the certificates to trust") from error
    except (*again, *failed, transfer.RetriesExceededError, transfer.CancelledError) as error:
        raise TryAgain(f"{where}: {error}") from error
    except (boto.BotoCoreError, Boto3Error, transfer.S3ValidationError, ResponseParserError) as error:
        raise UsageError(f"{where}: {error}") from error


def status(error: Any) -> int:
    """The HTTP status of a `ClientError`; 0 where there was none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def ended(where: str, code: str, text: str, http: int) -> Exception:
    """What a server's error means here."""
    what = f"{where}: {code}: {text}"
    if code == "NoSuchBucket":
        return UsageError(f"{what}; create the bucket, or correct the root's URI")
    if code in ("NoSuchKey", "404"):
        return NotFound(where)
    if http == 403 or code == "AccessDenied":
        hint = "S3 says so of a missing file too, where s3:ListBucket is not allowed"
        return UsageError(f"{what}; allow this role to do that ({hint})")
    if http == 501 or code == "NotImplemented":
        return UsageError(f"{what}; this server lacks what a store needs")
    if http in (409, 412, 429) or http >= 500 or code in AGAIN:
        return TryAgain(what)
    return UsageError(what)
