"""The form that moves an alias: who may send it, from where, and what it starts; the server writes nothing itself."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core import uris
from qlora_retrain.runtimes.airflow.ui import form_guard, headers
from qlora_retrain.storage import registry
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store
from tests.runtimes.airflow.ui.conftest import ORIGIN

pytestmark = pytest.mark.filterwarnings("ignore")  # Airflow's own, while it starts
LINE = "/qlora-retrain/models/intents"
Browser = Callable[..., Any]
Versions = tuple[Release, Release]


def form_of(page: str) -> dict[str, str]:
    """Return the hidden fields of the form that moves an alias."""
    (form,) = re.findall(r'<form method="post".*?</form>', page, re.DOTALL)
    fields = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form)
    return {name: html.unescape(value) for name, value in fields}


def changed_signature(token: str) -> str:
    """Return a token with another first character of its signature: the last one has two bits that nobody reads."""
    signed, dot, signature = token.rpartition(".")
    return signed + dot + ("B" if signature[0] == "A" else "A") + signature[1:]


def move_runs(client: Any) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = client.get("/api/v2/dags/qlora-retrain-move/dagRuns?order_by=-id").json()["dag_runs"]
    return runs


def contents(store: Store) -> dict[str, bytes]:
    root = uris.local_path(store.uri)
    return {str(path): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_a_button_starts_the_dag_in_the_name_of_the_user(
    browser: Browser, two_versions: Versions, publish: Callable[..., Release], store: Store, action: str
) -> None:
    first, second = (release.version for release in two_versions)
    third = publish(3).version
    operator, before = browser("operator"), contents(store)
    page = operator.get(LINE if action == "rollback" else f"{LINE}/{third}").text
    fields = {**form_of(page), "reason": "it swears 'ä' <b>"}
    answer = operator.post(f"{LINE}/move", data=fields, headers={"Origin": ORIGIN})
    assert (answer.status_code, answer.headers["location"]) == (303, f"{LINE}#moves")

    run = move_runs(browser())[0]
    target = first if action == "rollback" else third
    assert run["conf"] == {
        "line": "intents", "action": action, "version": target, "from_version": second, "reason": "it swears 'ä' <b>",
        "alias": "production",
    }  # fmt: skip
    assert run["triggering_user_name"] == "operator"
    events = browser().get("/api/v2/eventLogs?dag_id=qlora-retrain-move&order_by=-when").json()["event_logs"]
    assert (events[0]["event"], events[0]["owner"], events[0]["run_id"]) == (
        "trigger_dag_run", "operator", run["dag_run_id"],
    )  # fmt: skip
    assert run["dag_run_id"] in operator.get(LINE).text.replace("<wbr>", "")
    assert contents(store) == before


def test_who_may_not_start_the_dag_sees_no_button_and_is_refused(browser: Browser, two_versions: Versions) -> None:
    fields = {**form_of(browser("operator").get(LINE).text), "reason": "mine"}
    num_runs = len(move_runs(browser()))
    for user, status in ((None, 401), ("reader", 403), ("clerk", 403), ("nobody", 403)):
        client = browser(user)
        assert '<form method="post"' not in client.get(LINE).text
        assert "qlora-retrain-move" not in client.get(LINE).text or user == "reader"
        answer = client.post(f"{LINE}/move", data=fields, headers={"Origin": ORIGIN})
        assert answer.status_code == status, user
    assert len(move_runs(browser())) == num_runs


@pytest.mark.parametrize(
    "request_headers",
    [
        {},
        {"Origin": "null"},
        {"Origin": "https://evil.example"},
        {"Origin": f"{ORIGIN}.evil.example"},
        {"Origin": "https://airflow.example"},
        {"Referer": "https://evil.example/qlora-retrain"},
        {"Origin": "http://["},
        {"Origin": "null", "Referer": f"{ORIGIN}/"},
    ],
)
def test_a_form_of_another_site_is_refused(
    browser: Browser, two_versions: Versions, request_headers: dict[str, str]
) -> None:
    operator = browser("operator")
    fields = {**form_of(operator.get(LINE).text), "reason": "mine"}
    num_runs = len(move_runs(browser()))
    answer = operator.post(f"{LINE}/move", data=fields, headers=request_headers)
    assert (answer.status_code, "not sent from a page of this server" in answer.text) == (403, True)
    assert len(move_runs(browser())) == num_runs
    assert operator.post(f"{LINE}/move", data=fields, headers={"Referer": f"{ORIGIN}/x"}).status_code == 303


def test_a_token_is_good_for_one_user_one_line_and_an_hour(
    browser: Browser, two_versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, admin = browser("operator"), browser("admin")
    fields = {**form_of(operator.get(LINE).text), "reason": "mine"}
    request_headers = {"Origin": ORIGIN}
    tokens = {
        "another user's": form_of(admin.get(LINE).text)["token"],
        "another line's": form_guard.new_token(type("User", (), {"get_id": lambda self: "operator"})(), "secrets"),
        "none": "x",
        "of another signature": changed_signature(fields["token"]),
    }
    for name, token in tokens.items():
        answer = operator.post(f"{LINE}/move", data={**fields, "token": token}, headers=request_headers)
        assert (answer.status_code, "older than an hour" in answer.text) == (403, True), name
    monkeypatch.setattr(form_guard, "_MAX_AGE_SECONDS", -1)
    assert operator.post(f"{LINE}/move", data=fields, headers=request_headers).status_code == 403


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"reason": ""}, 422),
        ({"reason": "two\nlines"}, 422),
        ({"reason": "a\x00b"}, 422),
        ({"reason": "x" * 501}, 422),
        ({"action": "delete"}, 422),
        ({"version": "../../x"}, 422),
        ({"alias": "latest"}, 422),
        ({"version": "20260101T000000Z-000000000000"}, 404),
        ({"from_version": ""}, 409),
        ({"from_version": "20260101T000000Z-000000000000"}, 409),
        ({"reason": "x" * headers.MAX_BODY_BYTES}, 413),
    ],
)
def test_a_form_that_asks_for_something_else_is_refused(
    browser: Browser, two_versions: Versions, change: dict[str, str], status: int
) -> None:
    operator = browser("operator")
    fields = {**form_of(operator.get(LINE).text), "reason": "mine", **change}
    num_runs = len(move_runs(browser()))
    answer = operator.post(f"{LINE}/move", data=fields, headers={"Origin": ORIGIN})
    assert answer.status_code == status, answer.text
    assert len(move_runs(browser())) == num_runs


def test_what_is_in_production_or_was_rejected_has_no_button(
    browser: Browser, two_versions: Versions, store: Store
) -> None:
    first, second = (release.version for release in two_versions)
    assert "<form method" not in browser("operator").get(f"{LINE}/{second}").text
    registry.rollback(store, "intents", registry.PRODUCTION, reason="a test")
    assert "<form method" not in browser("operator").get(f"{LINE}/{first}").text
    page = browser("operator").get(f"{LINE}/{second}").text
    assert "<form method" not in page
    assert "rejected by a rollback" in page
    # There is nothing left to go back to.
    assert "Roll back" not in browser("operator").get(LINE).text


def test_the_first_version_of_all_is_promoted_from_none(
    browser: Browser, publish: Callable[..., Release], store: Store
) -> None:
    version = publish(1).version
    operator = browser("operator")
    fields = {**form_of(operator.get(f"{LINE}/{version}").text), "reason": "the first one"}
    assert operator.post(f"{LINE}/move", data=fields, headers={"Origin": ORIGIN}).status_code == 303
    assert move_runs(browser())[0]["conf"]["from_version"] == "none"
