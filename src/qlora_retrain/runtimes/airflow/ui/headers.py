"""The headers of every page, and the limit on what a request may send.

Pages are shown in a frame of Airflow's own pages, and in no other. They load nothing and run no script.
"""

from __future__ import annotations

import base64
import hashlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_retrain.runtimes.airflow.ui.pages import PAGE_STYLE

_STYLE_HASH = base64.b64encode(hashlib.sha256(PAGE_STYLE.encode()).digest()).decode()
# Our own pages have one style sheet and no style attribute, so its hash is all that is allowed.
PAGE_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; frame-src 'self'; form-action 'self'; "
    "frame-ancestors 'self'; base-uri 'none'"
)
# A report places its bars by style attributes, which no hash can allow. `sandbox` takes its origin from it, so that not
# even a script that got through could act for the reader.
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; frame-ancestors 'self'; base-uri 'none'; "
    "sandbox"
)
# A form has an address, a reason of 500 characters and a token.
MAX_BODY_BYTES = 16 * 1024


class PageHeaders:
    """Add the headers to every answer; refuse a body that is larger than our forms."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", PAGE_POLICY)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["X-Frame-Options"] = "SAMEORIGIN"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                # Not `no-referrer`: a form would then be sent with the origin `null`.
                headers["Referrer-Policy"] = "same-origin"
                # What one user may read, a shared cache must not keep.
                headers["Cache-Control"] = "no-store"
            await send(message)

        if scope["method"] not in ("GET", "HEAD") and not _is_small(Headers(scope=scope)):
            refusal = PlainTextResponse("A form of this page is smaller, and says how long it is.", status_code=413)
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def _is_small(headers: Headers) -> bool:
    """Return whether the body's length is known and small; the server itself holds a client to that length."""
    length = headers.get("content-length", "")
    return length.isascii() and length.isdigit() and int(length[:9]) <= MAX_BODY_BYTES and len(length) < 9
