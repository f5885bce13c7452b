"""A server before an S3 that does what bad servers and roles do: it refuses writes, ignores conditions, is late."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import urllib3

_ACCESS_DENIED = b"<Error><Code>AccessDenied</Code><Message>not yours</Message></Error>"
_CONDITIONS = ("if-match", "if-none-match")
_OF_THE_CONNECTION = {"connection", "content-length", "date", "expect", "server", "transfer-encoding"}


class SpoiledS3:
    """Passes requests on to an S3.

    Attributes:
        url: Its address.
        refuses_writes: Answer 403 to every write.
        ignores_conditions: Forget If-Match and If-None-Match.
        clock_shift: How far its clock is ahead.
    """

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.refuses_writes = self.ignores_conditions = False
        self.clock_shift = timedelta()
        spoiled = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                status, headers, content = spoiled.forward(self.command, self.path, dict(self.headers.items()), body)
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Date", format_datetime(datetime.now(UTC) + spoiled.clock_shift, usegmt=True))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815 - the base class's names

            def log_message(self, *_: object) -> None:
                pass

        self._pool = urllib3.PoolManager()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Pass a request on; return status, headers and content of the answer."""
        if self.refuses_writes and method == "PUT":
            return 403, {}, _ACCESS_DENIED
        dropped = _OF_THE_CONNECTION | (set(_CONDITIONS) if self.ignores_conditions else set())
        own_headers = {name: value for name, value in headers.items() if name.lower() not in dropped}
        answer: Any = self._pool.request(method, self.origin + path, headers=own_headers, body=body, retries=False)
        received = {name: value for name, value in answer.headers.items() if name.lower() not in _OF_THE_CONNECTION}
        return answer.status, received, answer.data

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(90)
        self._server.server_close()
        self._pool.clear()


def spoiled_s3(origin: str) -> Iterator[SpoiledS3]:
    server = SpoiledS3(origin)
    yield server
    server.close()
