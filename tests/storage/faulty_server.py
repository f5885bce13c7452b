"""Let requests to an S3 server fail: busy answers, timeouts, lost connections, and answers that are lost on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from botocore.awsrequest import AWSResponse
from botocore.exceptions import ConnectionClosedError, EndpointConnectionError, ReadTimeoutError

from qlora_retrain.core.errors import TryAgain
from qlora_retrain.storage.s3 import S3Store
from qlora_retrain.storage.store import Store
from tests.storage.dying_store import Interruption, Operation

_URL = "http://a.test"
# What happens to a request, and whether it reaches the server first.
FAULTS: dict[str, tuple[Callable[[], AWSResponse | Exception], bool]] = {
    "busy": (lambda: answer(503, "SlowDown"), False),
    "cannot connect": (lambda: EndpointConnectionError(endpoint_url=_URL), False),
    "connection reset": (lambda: ConnectionClosedError(endpoint_url=_URL), False),
    "answer lost": (lambda: ReadTimeoutError(endpoint_url=_URL), True),
    "error after the effect": (lambda: answer(500, "InternalError"), True),
}


class Raw:
    """The body of an answer made up by a test."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    def stream(self, *_: object, **__: object) -> list[bytes]:
        return [self.body]

    def read(self, *_: object) -> bytes:
        body, self.body = self.body, b""
        return body


def answer(status: int, code: str) -> AWSResponse:
    """An answer of a server that did not do what was asked."""
    body = f"<Error><Code>{code}</Code><Message>made up</Message></Error>".encode()
    return AWSResponse(_URL, status, {}, Raw(body))


@contextlib.contextmanager
def failing(store: S3Store, fault: str, is_due: Callable[[int], bool]) -> Iterator[list[int]]:
    """Let requests of a store fail in the block, those whose number is due; yield a list of all numbers so far."""
    numbers: list[int] = []
    make, reaches_server = FAULTS[fault]

    def handler(request: Any, **_: object) -> AWSResponse | None:
        numbers.append(len(numbers) + 1)
        if not is_due(numbers[-1]):
            return None
        if reaches_server:
            store.client._endpoint.http_session.send(request).content  # noqa: B018 - reads the answer to its end
        result = make()
        if isinstance(result, Exception):
            raise result
        return result

    event = "before-send.s3"
    store.client.meta.events.register_first(event, handler, unique_id="a test's fault")
    try:
        yield numbers
    finally:
        store.client.meta.events.unregister(event, unique_id="a test's fault")


def is_gone(fault: str) -> Interruption:
    """Every request from the n-th on fails, whatever is tried again."""

    def interruption(store: Store, operation: Operation, call: int) -> bool:
        assert isinstance(store, S3Store)
        with failing(store, fault, lambda number: number >= call) as numbers, contextlib.suppress(TryAgain):
            operation(store)
        return len(numbers) < call

    return interruption


def fails_every(fault: str) -> Interruption:
    """Every n-th request fails, once for each n from 1 to 9."""

    def interruption(store: Store, operation: Operation, call: int) -> bool:
        assert isinstance(store, S3Store)
        with failing(store, fault, lambda number: number % call == 0), contextlib.suppress(TryAgain):
            operation(store)
        return call > 8

    return interruption
