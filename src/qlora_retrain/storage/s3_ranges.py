"""Read ranges of an object, again where an answer breaks off: boto3 repeats only a request that got no answer.

`sha256` hashes an object by ranges that travel in parallel, for one stream has a small part of a server's bandwidth.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

from qlora_retrain.core.errors import Cause, TryAgain
from qlora_retrain.storage import s3_errors

# How often an answer may break off.
MAX_ROUNDS = 5
_SKIPPED_BYTES = 2**20
# 8 files of a version are hashed at once, so their ranges need 256 MiB of memory at most.
HASHED_BYTES = 8 * 2**20
_NUM_STREAMS = 4


def sha256(read: Callable[[int, int], bytes]) -> str:
    """Return the hash of an object, whose ranges travel in parallel.

    Args:
        read: Returns so many bytes from a first one on, fewer only where the object ends.
    """
    digest = hashlib.sha256()
    first = read(0, HASHED_BYTES)
    digest.update(first)
    if len(first) < HASHED_BYTES:
        return digest.hexdigest()

    with ThreadPoolExecutor(_NUM_STREAMS) as pool:
        under_way: deque[Future[bytes]] = deque()
        start, data = HASHED_BYTES, first
        # The end is where a range is short. Those behind it are asked for too, and are empty.
        while len(data) == HASHED_BYTES:
            while len(under_way) < _NUM_STREAMS:
                under_way.append(pool.submit(read, start, HASHED_BYTES))
                start += HASHED_BYTES
            data = under_way.popleft().result()
            digest.update(data)
    return digest.hexdigest()


def read_whole(stream: Any, size_bytes: int) -> bytes:
    """Return so many bytes of an answer's body, fewer only where it ends as its header says.

    Where a connection breaks off, `read` returns what has arrived and no error; only the next one compares lengths.
    """
    data = bytes(stream.read(size_bytes))
    while len(data) < size_bytes and (chunk := stream.read(size_bytes - len(data))):
        data += chunk
    return data


def read_range(
    get: Callable[[str], Any],
    errors: Callable[[], AbstractContextManager[None]],
    place: str,
    start: int,
    size_bytes: int,
) -> bytes:
    """Return the bytes of an object from `start` on, fewer where it ends.

    Args:
        get: Sends the request with this value of the `Range` header.
        errors: Translates the errors of boto3.
        place: The object, for messages.
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
                _refuse_other_range(response, place, start)
                # A server that ignores the range sends the whole object.
                num_skipped = 0 if "ContentRange" in response else start
                while num_skipped and (chunk := response["Body"].read(min(_SKIPPED_BYTES, num_skipped))):
                    num_skipped -= len(chunk)
                return read_whole(response["Body"], size_bytes)
        except TryAgain:
            if round_number == MAX_ROUNDS:
                raise
    raise AssertionError("the last round returns or raises")


def _refuse_other_range(response: Any, place: str, start: int) -> None:
    # Some caches give the first range that they saw to whoever asks for another one.
    expected, actual = f"bytes {start}-", str(response.get("ContentRange", f"bytes {start}-"))
    if not actual.startswith(expected):
        raise TryAgain(
            f"{place}: expected an answer with the bytes from {start} on, found one with {actual}; if that stays so, "
            "let no proxy or cache stand before the server",
            cause=Cause.THROTTLED,
        )
