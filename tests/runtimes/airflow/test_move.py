"""The task that moves an alias and the one that asks for approval: who may, in whose name, and with which command."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from qlora_retrain.core import graph, hashing
from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline import explain, make_plan, run_page, status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes.airflow import approval_text
from qlora_retrain.runtimes.airflow.move_request import Movement, request_id
from qlora_retrain.storage import actor, registry
from qlora_retrain.storage.registry import PRODUCTION, Release
from qlora_retrain.storage.store import Store
from tests.published import publish_version

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
LINE = "intents"
Context = dict[str, Any]
RunAll = Callable[[Plan], dict[str, int]]


@pytest.fixture(autouse=True)
def airflow_store(root_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_RETRAIN_ROOT", root_uri)
    monkeypatch.setattr(actor, "_orchestrator", "")


@pytest.fixture
def approved_line(line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A line that asks for approval; alice and bob may give it."""
    line.write_text(f"{line.read_text()}publish: {{approval: true, approval_hours: 5}}\n")
    platform_file = tmp_path / "platform.yaml"
    platform_file.write_text(f"approvers: {{{LINE}: [alice, bob]}}\n")
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(platform_file))
    return line


def version(store: Store, number: int, **numbers: object) -> Release:
    content = hashing.sha256_json(number)
    stamp = f"{datetime.now(UTC) - timedelta(days=9 - number):%Y%m%dT%H%M%SZ}"
    return registry.complete_version(
        store,
        Release(
            line=LINE,
            version=f"{stamp}-{content[:12]}",
            content_hash=content,
            created_at=stamp,
            files=(),
            adapter_key="a",
            judgement="j",
            keys={},
            base={},
            numbers={"evaluation": numbers},
            provenance={},
        ),
    )


def context(user: str | None, plan: Plan | None = None, **form: object) -> Context:
    from airflow.sdk.execution_time.context import OutletEventAccessors

    dag_run = SimpleNamespace(
        dag_id="qlora-retrain-move",
        run_id="manual__1",
        run_after=datetime(2026, 1, 31, 3, tzinfo=UTC),
        run_type="manual",
        triggering_user_name=user,
    )
    task_instance = SimpleNamespace(
        try_number=1, xcom_pull=lambda task_ids: plan.uri if plan else None, xcom_push=lambda key, value: None
    )
    return {"dag_run": dag_run, "params": form, "ti": task_instance, "outlet_events": OutletEventAccessors()}


def move_task(line: Path) -> Any:
    from qlora_retrain.runtimes.airflow.move import MoveOperator

    return MoveOperator(task_id="move", pipelines=line.parent)


def failure(run: Callable[[], object]) -> str:
    """Run a task that must fail at once; return its message."""
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException) as caught:
        run()
    return str(caught.value)


def named(store: Store, alias: str = PRODUCTION) -> str | None:
    state, _ = registry.read_alias(store, LINE, alias)
    return state.version if state else None


def test_the_form_moves_production_as_publish_would_and_a_second_try_finds_it_done(line: Path, store: Store) -> None:
    from airflow.sdk import AssetAlias

    release = version(store, 1)
    form = {"line": LINE, "action": "promote", "version": release.version, "from_version": "none", "reason": "--x $(y)"}
    for _ in range(2):
        task, ran = move_task(line), context("al ice", **form)
        task.execute(ran)
        ((event,),) = [events.asset_alias_events for events in ran["outlet_events"]._dict.values()]
        assert event.extra == {"version": release.version, "published": False, "moved": True, "alias": PRODUCTION}
        assert task.outlets == [AssetAlias(LINE)]
    state, _ = registry.read_alias(store, LINE, PRODUCTION)
    assert state is not None
    assert (state.version, state.generation) == (release.version, 1)
    assert state.actor.startswith("airflow:al%20ice via os:")
    assert state.reason == "--x $(y) (DAG run qlora-retrain-move manual__1)"


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"line": "none-such"}, "line none-such: has no file none-such.yaml"),
        ({"version": None}, "version: empty"),
        ({"version": "20260101T000000Z-000000000000"}, r"file:\S+: line intents has no version 20260101T"),
        ({"override": True}, "override: not in the form, which has action, alias, from_version, line, reason, version"),
        ({"alias": "latest"}, "latest names the newest version by itself"),
        (
            {"from_version": "20260101T000000Z-000000000000"},
            "intents@production: named 20260101T000000Z-000000000000 when this was decided, and names none now",
        ),
    ],
)
def test_what_cannot_be_moved_fails_at_once_with_the_reason(
    line: Path, store: Store, form: dict[str, object], reason: str
) -> None:
    whole = {"line": LINE, "action": "promote", "version": version(store, 1).version, "from_version": "none"}
    message = failure(lambda: move_task(line).execute(context("alice", **{**whole, "reason": "x", **form})))
    assert re.match(rf"config or usage error \(12\): {reason}", message), message
    assert named(store) is None


def test_where_a_line_asks_an_approver_alone_promotes_and_nobody_what_an_own_run_published(
    approved_line: Path, store: Store
) -> None:
    first, second = version(store, 1), version(store, 2)
    actor.name_orchestrator("airflow:alice")
    registry.move_alias(store, LINE, "latest", second, reason="published")
    registry.move_alias(store, LINE, PRODUCTION, first, reason="the first")
    form = {"line": LINE, "action": "promote", "version": second.version, "from_version": first.version, "reason": "x"}
    for user, reason in (
        ("mallory", "mallory is none of its approvers, whom platform.yaml names: alice, bob"),
        ("alice", f"alice asked for version {second.version}, so another person must approve it"),
        (None, "nobody signed in to start this run"),
    ):
        assert reason in failure(lambda user=user: move_task(approved_line).execute(context(user, **form)))
        assert named(store) == first.version
    move_task(approved_line).execute(context("bob", **form))
    assert named(store) == second.version
    # Back to what was there before may go whoever is on call.
    back = {"line": LINE, "action": "rollback", "from_version": second.version, "reason": "worse"}
    move_task(approved_line).execute({**context("mallory", **back), "dag_run": _other_run("mallory")})
    assert named(store) == first.version


def _other_run(user: str) -> Any:
    return SimpleNamespace(
        dag_id="qlora-retrain-move",
        run_id="manual__2",
        run_after=datetime(2026, 1, 31, 4, tzinfo=UTC),
        triggering_user_name=user,
    )


def test_a_line_cannot_drop_the_question_of_its_approvers(approved_line: Path, store: Store) -> None:
    text = approved_line.read_text().replace("approval: true", "approval: false, promote_to: null")
    approved_line.write_text(text)
    release = version(store, 1)
    form = {"line": LINE, "action": "promote", "version": release.version, "from_version": "none", "reason": "x"}
    message = failure(lambda: move_task(approved_line).execute(context("mallory", **form)))
    assert "mallory is none of its approvers" in message
    assert named(store) is None


def test_no_text_of_a_person_is_an_option_of_the_command() -> None:
    form = {"line": LINE, "action": "rollback", "from_version": "none", "reason": "--alias=x", "alias": None}
    movement = Movement.from_form(form, "production", "alice")
    command = movement.command(
        "file:///store", "DAG run d --to=x", request_id("r"), ["--triggered-by", "airflow:alice"]
    )
    assert command == [
        "rollback", "intents", "--root=file:///store", "--alias=production", "--from=none",
        f"--request={request_id('r')}", "--reason=--alias=x (DAG run d --to=x)", "--triggered-by", "airflow:alice",
    ]  # fmt: skip
    assert request_id("r") == request_id("r") != request_id("s")


def answer(line: Path, user: dict[str, str] | None, option: str, ran: Context) -> None:
    """Resume the task that asks, with an answer as Airflow hands it over."""
    from qlora_retrain.runtimes.airflow.approval import ApprovalOperator

    event = {
        "chosen_options": [option],
        "params_input": {},
        "responded_at": datetime.now(UTC),
        "responded_by_user": user,
        "timedout": user is None,
    }
    ApprovalOperator(task_id="approve", pipelines=line.parent).execute_complete(ran, event)


@pytest.mark.parametrize(
    ("requester", "user", "reason"),
    [
        ("alice", {"id": "alice", "name": "alice"}, "alice asked for version"),
        ("alice", {"id": "17", "name": "alice"}, "alice asked for version"),
        ("17", {"id": "17", "name": "bob"}, "bob asked for version"),
        ("alice", {"id": "eve", "name": "eve"}, "eve is none of its approvers"),
        (None, None, "nobody signed in"),
    ],
)
def test_an_approval_by_somebody_who_may_not_moves_nothing(
    approved_line: Path, store: Store, requester: str | None, user: dict[str, str] | None, reason: str
) -> None:
    release = version(store, 1)
    registry.move_alias(store, LINE, "staging", release, reason="passed")
    ran = context(requester, line=LINE, version=release.version, from_version="none")
    assert reason in failure(lambda: answer(approved_line, user, "Approve", ran))
    assert named(store) is None


def test_an_approval_moves_production_and_a_rejection_or_no_answer_skips(approved_line: Path, store: Store) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    release, bob = version(store, 1), {"id": "bob", "name": "bob"}
    registry.move_alias(store, LINE, "staging", release, reason="passed")
    ran = context("alice", line=LINE, version=release.version, from_version="none")
    for user, text in ((bob, "rejected by bob"), (None, "rejected: nobody answered in time")):
        with pytest.raises(AirflowSkipException, match=text):
            answer(approved_line, user, "Reject", ran)
    assert named(store) is None
    answer(approved_line, bob, "Approve", ran)
    state, _ = registry.read_alias(store, LINE, PRODUCTION)
    assert state is not None
    assert state.actor.startswith("airflow:bob via ")
    assert state.reason.startswith("approved by bob, asked for by alice (DAG run ")

    # A later try asks nobody again.
    from qlora_retrain.runtimes.airflow.approval import ApprovalOperator

    assert ApprovalOperator(task_id="approve", pipelines=approved_line.parent).execute(ran) is None


@pytest.mark.parametrize("alias", ["staging", PRODUCTION])
def test_an_approval_of_what_has_moved_meanwhile_is_void_with_who_moved_it(
    approved_line: Path, store: Store, alias: str
) -> None:
    release, newer = version(store, 1), version(store, 2)
    registry.move_alias(store, LINE, "staging", release, reason="passed")
    ran = context("alice", line=LINE, version=release.version, from_version="none")
    registry.move_alias(store, LINE, alias, newer, reason="a later run")
    message = failure(lambda: answer(approved_line, {"id": "bob", "name": "bob"}, "Approve", ran))
    assert f"this request is void: {LINE}@{alias} named" in message
    assert f"names {newer.version} now, moved by os:" in message
    assert "(a later run)" in message
    assert named(store) == (newer.version if alias == PRODUCTION else None)


def test_a_request_that_all_approvers_asked_for_and_a_void_one_ask_nobody(approved_line: Path, store: Store) -> None:
    from qlora_retrain.runtimes.airflow.approval import ApprovalOperator

    release = version(store, 1)
    task = ApprovalOperator(task_id="approve", pipelines=approved_line.parent)
    ran = context("alice", line=LINE, version=release.version, from_version="none")
    assert "this request is void: intents@staging named" in failure(lambda: task.execute(ran))
    actor.name_orchestrator("airflow:bob")
    for alias in ("latest", "staging"):
        registry.move_alias(store, LINE, alias, release, reason="published")
    assert "each of its approvers (alice, bob) asked for version" in failure(lambda: task.execute(ran))


def test_a_run_of_a_line_with_approval_stops_at_staging_and_asks_once(
    approved_line: Path, root_uri: str, store: Store, run_all: RunAll
) -> None:
    from airflow.sdk.exceptions import AirflowSkipException, DagRunTriggerException

    from qlora_retrain.runtimes.airflow.request_approval import RequestApprovalOperator

    plan = make_plan.make_plan(approved_line, root_uri)
    assert set(run_all(plan).values()) == {0}
    release = str(status.numbers(plan, graph.producer_name("release"))["version"])
    assert (named(store, "staging"), named(store)) == (release, None)
    command = f"qlora-retrain promote {LINE} {release} --from none --reason"
    assert command in explain.status_text(plan)
    assert command in run_page.page(plan)
    assert run_page.sentence(plan).startswith(f"Published {release}, promoted to staging. It waits for approval")

    task = RequestApprovalOperator(line=LINE)
    with pytest.raises(DagRunTriggerException) as caught:
        task.execute(context("alice", plan))
    trigger = caught.value
    assert (trigger.trigger_dag_id, trigger.dag_run_id) == ("qlora-retrain-approval", f"{LINE}__{release}__0")
    assert trigger.conf == {"line": LINE, "version": release, "from_version": "none"}
    assert trigger.skip_when_already_exists

    registry.move_alias(store, LINE, PRODUCTION, registry.read_release(store, LINE, release), reason="approved")
    with pytest.raises(AirflowSkipException, match=f"production names {release} already"):
        task.execute(context("alice", plan))
    assert "It was approved" in explain.status_text(plan)

    # A run that was judged against what is not in production any more has nothing to ask.
    registry.move_alias(store, LINE, PRODUCTION, version(store, 1), reason="by hand")
    message = failure(lambda: task.execute(context("alice", plan)))
    assert "the verdict compared with none, and it names" in message
    assert "moved by os:" in message


def test_a_run_without_a_promotion_and_an_unchanged_one_ask_nobody(
    approved_line: Path, root_uri: str, store: Store, run_all: RunAll
) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    from qlora_retrain.runtimes.airflow.request_approval import RequestApprovalOperator

    plan = make_plan.make_plan(approved_line, root_uri, overrides=["publish.promote_to=null"])
    run_all(plan)
    assert (named(store, "latest") is not None, named(store, "staging")) == (True, None)
    with pytest.raises(AirflowSkipException, match="nothing to approve"):
        RequestApprovalOperator(line=LINE).execute(context("alice", plan))
    plan.refuse_other(alias="staging")
    with pytest.raises(UsageError, match="approval is for the alias production"):
        make_plan.make_plan(approved_line, root_uri, overrides=["publish.promote_to=canary"])


def test_what_a_rollback_of_production_rejected_is_not_asked_about(
    approved_line: Path, root_uri: str, store: Store, run_all: RunAll
) -> None:
    run_all(make_plan.make_plan(approved_line, root_uri))
    release = registry.read_release(store, LINE, str(named(store, "staging")))
    for candidate in (version(store, 1), release):
        registry.move_alias(store, LINE, PRODUCTION, candidate, reason="x")
    registry.rollback(store, LINE, PRODUCTION, reason="bad")
    newer = version(store, 2)
    registry.move_alias(store, LINE, "staging", newer, reason="x")
    codes = run_all(make_plan.make_plan(approved_line, root_uri, overrides=["evaluate.allow_first_release=true"]))
    assert codes["publish"] == 11
    assert named(store, "staging") == newer.version


def test_the_question_is_one_block_of_text_that_no_report_can_end(line: Path, store: Store) -> None:
    fence = "`" * 7
    champion, release = (
        version(store, 1, accuracy=0.8125, verdict="pass"),
        version(store, 2, accuracy=0.9, verdict=fence),
    )
    text = approval_text.body(store, LINE, release.version, champion.version, "[x](http://evil)\x1b[31m")
    first, *_, last = text.split("\n")
    assert (first, last) == (f"{fence}`text", f"{fence}`")
    assert f"{fence}`" not in text[len(first) : -len(last)]
    assert "\x1b" not in text
    assert re.search(r"evaluation\.accuracy +0\.9 +0\.8125", text)
    assert "settings: cannot be compared, since a version has no recipe" in text
    assert "nothing to compare with" in approval_text.body(store, LINE, release.version, "none", None)


def test_an_approver_reads_both_verdicts_first(store: Store, tmp_path: Path) -> None:
    release = publish_version(store, tmp_path / "version", 1, accuracy=0.9)
    _, first, second, *_ = approval_text.body(store, release.line, release.version, "none", "alice").split("\n")
    assert first == "verdict     pass: passed 8 rules: accuracy 0.9"
    assert second == "as shipped  pass: passed 10 rules"


def test_kubeflow_may_move_staging_alone(approved_line: Path, root_uri: str) -> None:
    from qlora_retrain.runtimes.kubeflow.parameters import pipeline_parameters

    parameters = pipeline_parameters(approved_line, root_uri)
    assert (parameters["alias"], yaml.safe_load(str(parameters["line"]["publish"]))["approval"]) == ("staging", True)
