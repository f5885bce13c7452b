"""Deliver a message or a request to a server over an Airflow connection: by webhook, by email or by Apprise.

The connection has the address and the secret, which may both be in one URL. So no error here quotes an address, a
library's message or an answer: only the connection's name, the status and what to do. Redirects are not followed, since
they could lead a signed request to any host that this one reaches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import Cause, Problem, TryAgain, UsageError
from qlora_retrain.runtimes.airflow import signing

if TYPE_CHECKING:
    from airflow.sdk import Connection

    from qlora_retrain.runtimes.airflow.run_message import RunMessage

TIMEOUT_SECONDS = 20.0
# The others of 4xx would be answered again in the same way.
_STATUSES_TO_RETRY = (408, 425, 429)


def deliver(kind: str, connection: str, message: RunMessage, to: Sequence[str] = ()) -> None:
    """Deliver a message to people.

    Args:
        kind: `webhook`, `email` or `apprise`.
        connection: The connection's name.
        message: The message.
        to: Of emails, the addresses.

    Raises:
        TryAgain: If it may be delivered later.
        UsageError: If the connection cannot be used as it is.
    """
    if kind == "webhook":
        post_json(connection, message.as_json(), message.id)
    elif kind == "email":
        _deliver_by(connection, "smtp", lambda: _email(connection, message, to))
    else:
        _deliver_by(connection, "apprise", lambda: _apprise(connection, message))


def post_json(connection_name: str, document: Mapping[str, Any], event_id: str, *, must_sign: bool = False) -> None:
    """Send a JSON document by POST, signed where the connection has a password.

    Args:
        connection_name: The connection: its host is the URL, its password the key that signs, and `headers` in its
            extra are further headers.
        document: The document; the time is added to it.
        event_id: The event's id, by which the receiver knows a document that it got twice.
        must_sign: Refuse a connection without a password.

    Raises:
        TryAgain: If the server may take it later.
        UsageError: If it will not, or if the connection cannot be used as it is.
    """
    import httpx

    now = int(time.time())
    timestamp = datetime.fromtimestamp(now, UTC).isoformat()
    body = json.dumps({**document, "timestamp": timestamp}, ensure_ascii=False).encode()
    connection = find_connection(connection_name)
    headers = {"content-type": "application/json", "user-agent": "qlora-retrain", **_extra_headers(connection)}
    if connection.password or must_sign:
        try:
            headers |= signing.headers(connection.password or "", event_id, now, body)
        except UsageError as error:
            raise UsageError(f"connection {connection_name}: {error}") from None
    url = _url(connection_name, connection)

    # Streamed, because nothing of the answer's body is read: a server could send one without an end.
    try:
        with httpx.stream(
            "POST", url, content=body, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=False
        ) as response:
            status = response.status_code
    except (httpx.InvalidURL, httpx.LocalProtocolError, ValueError):
        raise UsageError(f"connection {connection_name}: its host or a header cannot be sent; correct it") from None
    except httpx.HTTPError as error:
        raise TryAgain(
            f"connection {connection_name}: the server cannot be reached ({type(error).__name__})",
            cause=Cause.THROTTLED,
        ) from None
    _check_status(connection_name, status)


def _check_status(connection_name: str, status: int) -> None:
    if 200 <= status < 300:
        return
    if 300 <= status < 400:
        raise UsageError(
            f"connection {connection_name}: the server answered {status}, which names another address; redirects are "
            "not followed, so put that address into the connection"
        )
    if status >= 500 or status in _STATUSES_TO_RETRY:
        raise TryAgain(f"connection {connection_name}: the server answered {status}", cause=Cause.THROTTLED)
    raise UsageError(f"connection {connection_name}: the server answered {status}; see its own log for the reason")


def _url(name: str, connection: Connection) -> str:
    host = connection.host or ""
    if not host.startswith(("https://", "http://")):
        raise UsageError(
            f"connection {name}: expected the whole URL as its host, such as https://server.example/path; "
            "leave schema and port empty"
        )
    return host


def _extra_headers(connection: Connection) -> dict[str, str]:
    headers = connection.extra_dejson.get("headers")
    return {str(name).lower(): str(value) for name, value in headers.items()} if isinstance(headers, dict) else {}


def find_connection(name: str) -> Connection:
    """Return an Airflow connection.

    Raises:
        UsageError: If there is none of that name.
    """
    from airflow.sdk import Connection
    from airflow.sdk.exceptions import AirflowNotFoundException

    try:
        return Connection.get(name)
    except AirflowNotFoundException:
        raise UsageError(f"connection {name}: not defined in Airflow; `airflow connections add {name} ...`") from None


def _deliver_by(connection_name: str, provider: str, send: Callable[[], None]) -> None:
    """Call `send`, which uses an optional provider, and turn every error into one of ours."""
    find_connection(connection_name)
    try:
        send()
    except Problem:
        raise
    except ImportError:
        raise UsageError(
            f"connection {connection_name}: needs apache-airflow-providers-{provider} where Airflow's tasks run"
        ) from None
    # Whatever the library raises may hold the address with its secret.
    except Exception as error:  # noqa: BLE001
        raise TryAgain(
            f"connection {connection_name}: the message was not taken ({type(error).__name__})", cause=Cause.THROTTLED
        ) from None


def _email(connection_name: str, message: RunMessage, to: Sequence[str]) -> None:
    from airflow.providers.smtp.hooks.smtp import SmtpHook

    with SmtpHook(connection_name) as hook:
        content = f"<pre>{escape(message.text())}</pre>"
        hook.send_email_smtp(to=list(to), subject=message.subject(), html_content=content)


def _apprise(connection_name: str, message: RunMessage) -> None:
    import apprise
    from airflow.providers.apprise.hooks.apprise import AppriseHook

    # Not the hook's own `notify`, which does not say whether a message was taken.
    hook, services = AppriseHook(connection_name), apprise.Apprise()
    hook.set_config_from_conn(hook.get_connection(connection_name), services)
    level = apprise.NotifyType.SUCCESS if message.event == "published" else apprise.NotifyType.WARNING
    if not services.notify(body=message.text(), title=message.subject(), notify_type=level, tag="all"):
        raise TryAgain(
            f"connection {connection_name}: Apprise could not deliver to every service; its log says to which",
            cause=Cause.THROTTLED,
        )
