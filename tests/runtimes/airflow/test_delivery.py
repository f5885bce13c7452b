"""Messages over real sockets: what receivers get, how they check it, and what an error says."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from email import message_from_string
from email.header import decode_header, make_header
from typing import Any

import pytest

from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.runtimes.airflow import delivery, signing
from qlora_retrain.runtimes.airflow.run_message import RunMessage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
KEY = "whsec_" + base64.b64encode(bytes(range(32))).decode()
MESSAGE = RunMessage(
    "published",
    line="tickets",
    run="manual__2026-01-31T03:00:00+00:00",
    sentence="Published 1-abc <b>, promoted to production.",
    version="1-abc",
    numbers={"accuracy_challenger": 0.91234, "accuracy_champion": 0.9},
    links={"airflow": "https://airflow.example/dags/tickets/runs/x"},
)


def is_right(headers: dict[str, str], body: bytes, key: str = KEY) -> bool:
    """Check a request as the documentation shows it to receivers."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = hmac.new(base64.b64decode(key.removeprefix("whsec_")), signed, hashlib.sha256).digest()
    signature = "v1," + base64.b64encode(expected).decode()
    is_fresh = abs(time.time() - int(headers["webhook-timestamp"])) < 300
    return is_fresh and hmac.compare_digest(signature, headers["webhook-signature"])


def test_the_signature_is_that_of_the_specifications_own_example() -> None:
    # From the README of github.com/standard-webhooks/standard-webhooks, as its libraries test it.
    headers = signing.headers(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("key", ["", "secret", "whsec_", "whsec_c2hvcnQ=", "whsec_%%%", KEY.removeprefix("whsec_")])
def test_a_password_that_is_no_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(UsageError, match="openssl rand -base64 32") as caught:
        signing.headers(key, "evt_1", 1, b"{}")
    assert key == "" or key == "whsec_" or key not in str(caught.value)


def test_a_webhook_is_signed_json_with_the_same_id_at_every_try(receiver: Any, connect: Callable[..., None]) -> None:
    connect("ops", conn_type="http", host=f"{receiver.url}/a/b", password=KEY, extra={"headers": {"X-Team": "ml"}})
    delivery.deliver("webhook", "ops", MESSAGE)
    delivery.deliver("webhook", "ops", MESSAGE)

    (path, headers, body), (_, again, _) = receiver.requests
    assert path == "/a/b"
    assert (headers["content-type"], headers["x-team"]) == ("application/json", "ml")
    assert is_right(headers, body)
    assert not is_right(headers, body.replace(b"1-abc", b"2-abc"))
    assert headers["webhook-id"] == again["webhook-id"]
    document = json.loads(body)
    assert document["type"] == "run.published"
    assert document["data"]["version"] == "1-abc"
    assert document["data"]["numbers"] == {"accuracy_challenger": 0.91234, "accuracy_champion": 0.9}


def test_a_webhook_without_a_password_is_not_signed_and_a_hook_needs_one(
    receiver: Any, connect: Callable[..., None]
) -> None:
    connect("ops", conn_type="http", host=receiver.url)
    delivery.deliver("webhook", "ops", MESSAGE)
    assert "webhook-signature" not in receiver.requests[0][1]
    with pytest.raises(UsageError, match="connection ops: its password is no key"):
        delivery.post_json("ops", {}, "evt_1", must_sign=True)
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        (500, TryAgain, "answered 500"),
        (429, TryAgain, "answered 429"),
        (404, UsageError, "answered 404"),
        (302, UsageError, "redirects are not followed"),
        (307, UsageError, "redirects are not followed"),
    ],
)
def test_an_answer_that_is_none_is_an_error_that_shows_no_address(
    receiver: Any, connect: Callable[..., None], status: int, error: type[Exception], text: str
) -> None:
    receiver.statuses = [status]
    connect("ops", conn_type="http", host=f"{receiver.url}/services/T0KEN")
    with pytest.raises(error, match=text) as caught:
        delivery.deliver("webhook", "ops", MESSAGE)
    assert "T0KEN" not in str(caught.value)
    assert caught.value.__cause__ is None
    # Nothing but the one request: no redirect was followed.
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"host": "http://127.0.0.1:9/T0KEN"}, TryAgain, "cannot be reached \\(ConnectError\\)"),
        ({"host": "server.example/T0KEN"}, UsageError, "expected the whole URL"),
        ({"host": "file:///etc/passwd"}, UsageError, "expected the whole URL"),
        ({"host": "http://[::T0KEN"}, UsageError, "cannot be sent"),
        ({"extra": {"headers": {"a": "T0KEN\n"}}}, UsageError, "cannot be sent"),
        ({"extra": {"headers": {"ä": "T0KEN"}}}, UsageError, "cannot be sent"),
    ],
)
def test_a_connection_that_cannot_be_used_is_said_so(
    receiver: Any, connect: Callable[..., None], fields: dict[str, object], error: type[Exception], text: str
) -> None:
    connect("ops", **{"conn_type": "http", "host": receiver.url, **fields})
    with pytest.raises(error, match=text) as caught:
        delivery.deliver("webhook", "ops", MESSAGE)
    assert "T0KEN" not in str(caught.value)


@pytest.mark.parametrize("kind", ["webhook", "email", "apprise"])
def test_a_connection_that_is_not_there_is_said_so(kind: str) -> None:
    with pytest.raises(UsageError, match="connection absent: not defined in Airflow"):
        delivery.deliver(kind, "absent", MESSAGE, ["a@example.com"])


def test_an_email_is_plain_to_read_and_escaped(mailbox: Any, connect: Callable[..., None]) -> None:
    extra = {"from_email": "retrain@example.com", "disable_ssl": True, "disable_tls": True}
    connect("mail", conn_type="smtp", host="127.0.0.1", port=mailbox.port, extra=extra)
    delivery.deliver("email", "mail", MESSAGE, ["ml@example.com"])
    (mail,) = map(message_from_string, mailbox.mails)
    assert str(make_header(decode_header(mail["Subject"]))) == "tickets: published (1-abc)"
    assert mail["To"] == "ml@example.com"
    (part,) = (part for part in mail.walk() if part.get_content_type() == "text/html")
    text = part.get_payload(decode=True).decode()
    assert "Published 1-abc &lt;b&gt;, promoted" in text
    assert "accuracy_challenger: 0.9123" in text


def test_apprise_reaches_its_services_and_a_service_that_fails_is_an_error(
    receiver: Any, connect: Callable[..., None]
) -> None:
    address = receiver.url.removeprefix("http://")
    connect(
        "chat", conn_type="apprise", extra={"config": {"path": f"json://{address}/T0KEN?cto=60&rto=60", "tag": "ops"}}
    )
    delivery.deliver("apprise", "chat", MESSAGE)
    (document,) = receiver.documents
    assert (document["title"], document["type"]) == ("tickets: published (1-abc)", "success")
    assert "promoted to production" in document["message"]

    receiver.statuses = [500]
    with pytest.raises(TryAgain, match="could not deliver to every service") as caught:
        delivery.deliver("apprise", "chat", MESSAGE)
    assert "T0KEN" not in str(caught.value)


def test_an_error_of_a_library_is_told_by_its_kind_alone(connect: Callable[..., None]) -> None:
    connect("mail", conn_type="smtp", host="127.0.0.1", port=9, extra={"from_email": "a@example.com", "retry_limit": 0})
    with pytest.raises(TryAgain, match="the message was not taken \\(ConnectionRefusedError\\)"):
        delivery.deliver("email", "mail", MESSAGE, ["ml@example.com"])
