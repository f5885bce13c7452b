"""Read a range of an object, again where an answer breaks off: boto3 repeats only a request that got no answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from qlora_retrain.core.errors import TryAgain
from qlora_retrain.storage import s3_errors

# How often an answer may break off.
MAX_ROUNDS = 5
_SKIPPED_BYTES = 2**20


def read_range(
    get: Callable[[str], Any], errors: Callable[[], AbstractContextManager[None]], start: int, size_bytes: int
) -> bytes:
    """Return the bytes of an object from `start` on, fewer where it ends.

    Args:
        get: Sends the request with this value of the `Range` header.
        errors: Translates the errors of boto3.
        start: The first byte.
        size_bytes: How many bytes.
    """
    from botocore.exceptions import ClientError

    for round_number in range(1, MAX_ROUNDS + 1):
        with errors():
            try:
                response = get(f"bytes={start}-{start + size_bytes - 1}")
            except ClientError as error:
                if s3_errors.http_status(error) == 416:  # the object ends before
                    return b""
                raise
        try:
            with errors():
                # A server that ignores the range sends the whole object.
                num_skipped = 0 if "ContentRange" in response else start
                while num_skipped and (chunk := response["Body"].read(min(_SKIPPED_BYTES, num_skipped))):
                    num_skipped -= len(chunk)
                return bytes(response["Body"].read(size_bytes))
        except TryAgain:
            if round_number == MAX_ROUNDS:
                raise
    raise AssertionError("the last round returns or raises")
