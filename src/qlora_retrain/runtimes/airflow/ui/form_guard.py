"""Only a form of our own pages, sent by the user who got it, changes anything.

The browser sends the session's cookie with whatever is sent to this server. Three things stand against another site:
the cookie is `SameSite=Lax`, `Origin` (or `Referer`) must name this server, and the form holds a token. The token is
signed with the API server's secret key for one user and one line, and is good for an hour. It is bound to the user and
not to the session, because an auth manager may renew the session between the page and the form.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from airflow.api_fastapi.auth.tokens import get_signing_key
from airflow.configuration import conf
from fastapi import HTTPException, Request
from itsdangerous import BadSignature, URLSafeTimedSerializer

_MAX_AGE_SECONDS = 3600


def new_token(user: Any, line: str) -> str:
    """Return the token of a form for a user and a line."""
    return str(_serializer().dumps(_claims(user, line)))


def check_token(token: str, user: Any, line: str) -> None:
    """Refuse a token that is none, is old, or is another user's or line's.

    Raises:
        HTTPException: 403.
    """
    try:
        claims = _serializer().loads(token, max_age=_MAX_AGE_SECONDS)
    except BadSignature:
        claims = None
    if claims != _claims(user, line):
        raise HTTPException(403, "The form is older than an hour, or was not yours: open the page again and send it.")


def check_origin(request: Request) -> None:
    """Refuse a form that another site has sent.

    Raises:
        HTTPException: 403.
    """
    # A browser names the origin of every form; without it, and with `null`, nobody knows who sent it.
    source = request.headers.get("origin") or request.headers.get("referer") or ""
    own = {_origin(str(request.url)), _origin(conf.get("api", "base_url", fallback=""))} - {None}
    if _origin(source) not in own:
        raise HTTPException(403, "The form was not sent from a page of this server.")


def _serializer() -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(get_signing_key("api", "secret_key"), salt="qlora-retrain: move an alias")


def _claims(user: Any, line: str) -> list[str]:
    return [str(user.get_id()), line]


def _origin(url: str) -> tuple[str, str] | None:
    """Return scheme and host of a URL; None where it has none."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return (parts.scheme, parts.netloc) if parts.scheme in ("http", "https") and parts.netloc else None
