"""A real Airflow with four users: an alias moves by REST, an approval is asked for, answered, refused and void."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from qlora_retrain.core import hashing
from qlora_retrain.demo.airflow_api import AirflowApi, AirflowApiError
from qlora_retrain.demo.standalone_airflow import StandaloneAirflow
from qlora_retrain.pipeline import make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes.airflow.move_request import APPROVAL_DAG, MOVE_DAG
from qlora_retrain.storage import open_store, registry
from qlora_retrain.storage.registry import PRODUCTION, Alias, Release
from qlora_retrain.storage.store import Store

# Airflow starts in each of these files, and beside a busy program that alone may take minutes.
pytestmark = [pytest.mark.airflow, pytest.mark.slow, pytest.mark.timeout(3600)]
WAIT_SECONDS = 400.0


@pytest.fixture
def store(site_folder: Path) -> Store:
    return open_store((site_folder / "store").as_uri())


def version(store: Store, line: str, number: int) -> Release:
    """A published version without files; a larger number is a newer one."""
    content = hashing.sha256_json([line, number])
    stamp = f"{datetime.now(UTC) - timedelta(days=9 - number):%Y%m%dT%H%M%SZ}"
    return registry.complete_version(
        store,
        Release(
            line=line,
            version=f"{stamp}-{content[:12]}",
            content_hash=content,
            created_at=stamp,
            files=(),
            adapter_key="a",
            judgement="j",
            keys={},
            base={},
            numbers={"evaluation": {"verdict": "pass", "accuracy_challenger": 0.9}},
            provenance={"run_id": "r"},
        ),
    )


def production(store: Store, line: str) -> Alias:
    state, _ = registry.read_alias(store, line, PRODUCTION)
    assert state is not None
    return state


def ask(airflow: StandaloneAirflow, api: AirflowApi, store: Store, line: str) -> tuple[str, Release, Release]:
    """Put a version into staging beside one in production, and ask for approval; return the run and both versions."""
    current, release = version(store, line, 1), version(store, line, 2)
    registry.move_alias(store, line, PRODUCTION, current, reason="the first")
    registry.move_alias(store, line, "staging", release, reason="passed")
    form = {"line": line, "version": release.version, "from_version": current.version}
    run_id = api.trigger(APPROVAL_DAG, form)
    wait_for_question(api, airflow.home, run_id)
    return run_id, current, release


def wait_for_question(api: AirflowApi, airflow_home: Path, run_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_SECONDS
    while (state := api.task_states(APPROVAL_DAG, run_id)[0].state) != "awaiting_input":
        assert state != "failed", api.failure_message(APPROVAL_DAG, run_id, "approve")
        assert time.monotonic() < deadline, state
        time.sleep(0.3)
    # The process that asked ends seconds later. Airflow 3.3.2 takes its end for that of a task which an answer has
    # resumed meanwhile, and then asks once more. No person answers so fast.
    log = Path(airflow_home, "scheduler.log")
    while not any("TaskInstance Finished" in entry and run_id in entry for entry in log.read_text().split("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    detail: dict[str, Any] = api.request("GET", question_path(run_id))
    return detail


def question_path(run_id: str) -> str:
    return f"dags/{APPROVAL_DAG}/dagRuns/{quote(run_id, safe='')}/taskInstances/approve/-1/hitlDetails"


def answer(api: AirflowApi, run_id: str, option: str) -> str:
    """Answer a question; return the state of its task after that."""
    api.request("PATCH", question_path(run_id), {"chosen_options": [option], "params_input": {}})
    api.wait_until_finished(APPROVAL_DAG, run_id, timeout_seconds=WAIT_SECONDS)
    return str(api.task_states(APPROVAL_DAG, run_id)[0].state)


def test_a_move_by_rest_is_made_and_audited_and_emits_the_lines_asset(
    airflow: StandaloneAirflow, user_api: Callable[[str], AirflowApi], store: Store
) -> None:
    first, second = version(store, "mails", 1), version(store, "mails", 2)
    alice = user_api("alice")
    reason = "--override; $(id) {{ conn.x }} looks good"
    for current, release in (("none", first), (first.version, second)):
        form = {"line": "mails", "action": "promote", "version": release.version, "from_version": current}
        run_id = alice.trigger(MOVE_DAG, {**form, "reason": reason})
        state = alice.wait_until_finished(MOVE_DAG, run_id, timeout_seconds=WAIT_SECONDS)
        assert state == "success", alice.failure_message(MOVE_DAG, run_id, "move")
    alias = production(store, "mails")
    assert alias.version == second.version
    assert alias.actor.startswith("airflow:alice via os:")
    assert alias.reason == f"{reason} (DAG run {MOVE_DAG} {run_id})"
    events = alice.request("GET", f"assets/events?source_dag_id={MOVE_DAG}&source_run_id={quote(run_id)}")
    (event,) = events["asset_events"]
    assert event["extra"] == {"version": second.version, "published": False, "moved": True, "alias": PRODUCTION}
    assert event["uri"].rstrip("/").endswith("/models/mails")

    # Somebody decided by what production named before.
    stale = {"line": "mails", "action": "rollback", "from_version": first.version, "reason": "worse"}
    run_id = user_api("bob").trigger(MOVE_DAG, stale)
    assert alice.wait_until_finished(MOVE_DAG, run_id, timeout_seconds=WAIT_SECONDS) == "failed"
    assert alice.task_states(MOVE_DAG, run_id)[0].try_number == 1
    message = alice.failure_message(MOVE_DAG, run_id, "move")
    assert "config or usage error (12)" in message
    assert f"names {second.version} now: airflow:alice via " in message
    run_id = user_api("bob").trigger(MOVE_DAG, {**stale, "from_version": second.version})
    assert alice.wait_until_finished(MOVE_DAG, run_id, timeout_seconds=WAIT_SECONDS) == "success"
    assert (production(store, "mails").version, production(store, "mails").actor[:11]) == (first.version, "airflow:bob")


@pytest.mark.parametrize(
    "form",
    [
        {"line": "../mails"},
        {"action": "drop"},
        {"from_version": None},
        {"version": "latest"},
        {"alias": "../x"},
        {"reason": ""},
    ],
)
def test_a_field_of_the_form_that_is_none_is_refused(
    airflow: StandaloneAirflow, user_api: Callable[[str], AirflowApi], form: dict[str, object]
) -> None:
    whole = {"line": "mails", "action": "rollback", "from_version": "none", "reason": "x"}
    with pytest.raises(AirflowApiError) as caught:
        user_api("alice").trigger(MOVE_DAG, {**whole, **form})
    assert 400 <= caught.value.status < 500


def test_what_another_approver_approves_moves_production(
    airflow: StandaloneAirflow, user_api: Callable[[str], AirflowApi], store: Store
) -> None:
    run_id, current, release = ask(airflow, user_api("alice"), store, "tickets")
    detail = user_api("bob").request("GET", question_path(run_id))
    assert detail["subject"] == f"tickets: may {release.version} become production?"
    assert [user["id"] for user in detail["assigned_users"]] == ["bob"]  # alice asked
    assert f"production  {current.version}" in detail["body"]
    assert "asked by    alice" in detail["body"]
    assert f"/qlora-retrain/models/tickets/diff?a={current.version}&b={release.version})" in detail["body"]
    for user in ("alice", "carol", "admin"):
        with pytest.raises(AirflowApiError) as caught:
            answer(user_api(user), run_id, "Approve")
        assert caught.value.status == 403
    assert answer(user_api("bob"), run_id, "Approve") == "success"
    alias = production(store, "tickets")
    assert alias.version == release.version
    assert alias.actor.startswith("airflow:bob via os:")
    assert alias.reason == f"approved by bob, asked for by alice (DAG run {APPROVAL_DAG} {run_id})"


def test_whoever_asked_cannot_approve_also_where_airflow_lets_everybody_answer(
    airflow: StandaloneAirflow, user_api: Callable[[str], AirflowApi], store: Store
) -> None:
    run_id, current, release = ask(airflow, user_api("alice"), store, "notes")
    assert answer(user_api("alice"), run_id, "Approve") == "failed"
    message = user_api("alice").failure_message(APPROVAL_DAG, run_id, "approve")
    assert f"alice asked for version {release.version}, so another person must approve it" in message
    assert production(store, "notes").version == current.version

    # Neither by hand, for that person; carol may.
    form = {"line": "notes", "action": "promote", "version": release.version, "from_version": current.version}
    alice, carol = user_api("alice"), user_api("carol")
    registry.move_alias(store, "notes", "latest", release, reason="published")
    run_id = carol.trigger(MOVE_DAG, {**form, "reason": "after a look at the reports"})
    assert alice.wait_until_finished(MOVE_DAG, run_id, timeout_seconds=WAIT_SECONDS) == "success"
    assert production(store, "notes").version == release.version


def test_a_request_is_void_once_production_has_moved(
    airflow: StandaloneAirflow, user_api: Callable[[str], AirflowApi], store: Store
) -> None:
    alice, bob = user_api("alice"), user_api("bob")
    run_id, current, _ = ask(airflow, alice, store, "letters")
    registry.move_alias(store, "letters", PRODUCTION, version(store, "letters", 4), reason="by hand")
    moved = production(store, "letters").version
    assert answer(bob, run_id, "Approve") == "failed"
    message = alice.failure_message(APPROVAL_DAG, run_id, "approve")
    assert (
        f"letters@production named {current.version} when it was made, and names {moved} now, moved by os:" in message
    )
    assert "(by hand)" in message
    assert production(store, "letters").version == moved


def test_a_run_of_a_line_ends_while_its_request_waits_and_another_run_asks_nobody_again(
    airflow: StandaloneAirflow,
    user_api: Callable[[str], AirflowApi],
    site_folder: Path,
    store: Store,
    run_all: Callable[[Plan], dict[str, int]],
) -> None:
    # The steps are made already, so the run in Airflow publishes nothing new.
    run_all(make_plan.make_plan(site_folder / "pipelines" / "parcels.yaml", store.uri))
    alice = user_api("alice")
    airflow.wait_for_dag("parcels")
    alice.unpause("parcels")
    for state in ("success", "skipped"):
        run_id = alice.trigger("parcels")
        assert alice.wait_until_finished("parcels", run_id, timeout_seconds=WAIT_SECONDS) == "success"
        tasks = {task.task_id: task.state for task in alice.task_states("parcels", run_id)}
        assert tasks["request_approval"] == state

    (request,) = (
        run
        for run in alice.request("GET", f"dags/{APPROVAL_DAG}/dagRuns")["dag_runs"]
        if "parcels" in run["dag_run_id"]
    )
    assert request["triggering_user_name"] == "alice"
    wait_for_question(alice, airflow.home, request["dag_run_id"])
    assert answer(user_api("carol"), request["dag_run_id"], "Approve") == "success"
    assert production(store, "parcels").version == request["conf"]["version"]
