"""The tasks after a run: whom they tell of which end, in which words, and what the DAG gets without them."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from qlora_retrain.config.line import load as load_line
from qlora_retrain.config.notify import HookConfig, NotifyConfig
from qlora_retrain.config.platform import PlatformConfig
from qlora_retrain.config.yaml_reader import load_section
from qlora_retrain.core import graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause, Exit, UsageError
from qlora_retrain.pipeline import make_plan, policies, run_endings, status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage.local import LocalStore
from tests.policies import is_allowed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
DAG_FILE = Path(__file__).resolve().parents[3] / "dags" / "retrain.py"
KEY = "whsec_" + base64.b64encode(bytes(32)).decode()
EVERY_END = ("failure", "refused", "published")
RunAll = Callable[[Plan], dict[str, int]]


def context_of(plan: Plan | None, /, **states: str) -> dict[str, Any]:
    """A task's context in a run whose tasks have these states, all others success."""
    all_states: dict[str, str] = dict.fromkeys((graph.PLAN_TASK, *(s.name for s in graph.STEPS)), "success") | states
    dag_run = SimpleNamespace(dag_id="tickets", run_id="manual__1", run_after=datetime(2026, 1, 31, 3, tzinfo=UTC))
    ti = SimpleNamespace(
        get_task_states=lambda dag_id, run_ids: {run_ids[0]: all_states},
        xcom_pull=lambda task_ids: plan.uri if plan else None,
    )
    params = {"resume_run": plan.run_id} if plan else {}
    return {"dag_run": dag_run, "ti": ti, "params": params}


@pytest.fixture
def ops(receiver: Any, connect: Callable[..., None]) -> Any:
    connect("ops", conn_type="http", host=receiver.url, password=KEY)
    return receiver


@pytest.fixture(autouse=True)
def own_store(root_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_RETRAIN_ROOT", root_uri)
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example/")


def tell(context: dict[str, Any], events: tuple[str, ...] = EVERY_END, pause_after: int | None = None) -> None:
    from qlora_retrain.runtimes.airflow.notify_operators import NotifyOperator

    entry = NotifyConfig(events=events, connection="ops", kind="webhook")
    NotifyOperator(task_id="notify_ops", entry=entry, line="tickets", pause_after=pause_after).execute(context)


def call_hook(context: dict[str, Any]) -> None:
    from qlora_retrain.runtimes.airflow.notify_operators import ReloadHookOperator

    entry = HookConfig(line="tickets", connection="ops")
    ReloadHookOperator(task_id="hook_ops", entry=entry, line="tickets").execute(context)


def test_a_published_version_is_told_with_its_numbers_and_the_server_with_its_name(
    made_plan: Plan, run_all: RunAll, ops: Any
) -> None:
    assert set(run_all(made_plan).values()) == {0}
    tell(context_of(made_plan))
    call_hook(context_of(made_plan))
    call_hook(context_of(made_plan))

    message, move, _ = ops.documents
    version = move["data"]["version"]
    assert message["type"] == "run.published"
    assert message["data"]["sentence"] == f"Published {version}, promoted to production."
    assert message["data"]["version"] == version
    assert message["data"]["links"]["airflow"] == "https://airflow.example/dags/tickets/runs/manual__1"
    assert move["type"] == "alias.moved"
    assert move["data"] == {
        "line": made_plan.line, "alias": "production", "version": version, "run": made_plan.run_id
    }  # fmt: skip
    ids = [headers["webhook-id"] for _, headers, _ in ops.requests]
    assert ids[1] == ids[2] != ids[0]


def test_the_role_of_messages_may_read_all_that_they_read(
    made_plan: Plan, run_all: RunAll, ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(made_plan)
    reads: set[str] = set()

    def spy(name: str) -> None:
        original = getattr(LocalStore, name)

        def read(store: LocalStore, path: str, *arguments: Any) -> Any:
            reads.add(f"{store.uri}/{path}".removeprefix(f"{made_plan.root}/"))
            return original(store, path, *arguments)

        monkeypatch.setattr(LocalStore, name, read)

    for name in ("read", "read_start", "read_range", "sha256", "list", "children"):
        spy(name)
    tell(context_of(made_plan))
    call_hook(context_of(made_plan))
    tell(context_of(made_plan, evaluate="failed"))

    line = "line: tickets\nsources: {raw_data: s3://data/tickets, base_model: s3://data/base}\n"
    document = policies.role_policy(load_line(line), "message", "s3://bucket/store")
    refused = {path for path in reads if not is_allowed(document, "s3:GetObject", f"arn:aws:s3:::bucket/store/{path}")}
    assert refused == set()
    assert {path.partition("/")[0] for path in reads} == {"runs", "artifacts"}


def test_a_move_by_hand_tells_every_server_of_the_line_and_one_that_fails_keeps_no_other_from_it(
    made_plan: Plan, run_all: RunAll, ops: Any, connect: Callable[..., None],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from airflow.sdk import DAG, BaseOperator
    from airflow.sdk.exceptions import AirflowException, AirflowSkipException

    from qlora_retrain.runtimes.airflow import notifications, notify_operators

    assert set(run_all(made_plan).values()) == {0}
    connect("unsigned", conn_type="http", host=ops.url)
    hooks = [{"line": "*", "connection": "unsigned"}, {"line": made_plan.line, "connection": "ops"}]
    (tmp_path / "platform.yaml").write_text(json.dumps({"hooks": hooks}))
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(tmp_path / "platform.yaml"))
    with DAG("qlora-retrain-move") as dag:
        notifications.add_move_hooks(dag, BaseOperator(task_id="move"))
    hook = dag.get_task("hooks")
    assert hook.is_teardown
    assert hook.upstream_task_ids == {"move"}

    context, moved = context_of(None), {"move": "production"}
    context["params"] = {"line": made_plan.line}
    context["ti"].xcom_pull = lambda task_ids, key: moved.get(task_ids) if key == notify_operators.MOVED_ALIAS else None
    with pytest.raises(AirflowException, match="connection unsigned"):
        hook.execute(context)
    (document,) = ops.documents
    assert document["data"]["line"] == made_plan.line
    assert document["data"]["version"].endswith(status.numbers(made_plan, "publish")["version"][-12:])

    moved["move"] = "staging"
    with pytest.raises(AirflowSkipException, match="did not move"):
        hook.execute(context)


def test_a_run_that_moved_nothing_is_told_to_nobody(made_plan: Plan, run_all: RunAll, line: Path, ops: Any) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    run_all(made_plan)
    again = make_plan.make_plan(line, made_plan.root)
    assert again.unchanged
    with pytest.raises(AirflowSkipException, match="unchanged"):
        tell(context_of(again))
    for context in (context_of(again), context_of(None, plan="failed")):
        with pytest.raises(AirflowSkipException, match="did not move production"):
            call_hook(context)
    assert ops.requests == []


@pytest.mark.parametrize(
    ("ending", "event", "sentence"),
    [
        (
            Ending(int(Exit.DATA_REFUSED), Cause.DATA_REFUSED, "7 rows left; 100 needed\nsecond line", "validate_data"),
            "refused",
            "validate_data: data refused (10): 7 rows left; 100 needed",
        ),
        (
            Ending.from_problem("validate_data", UsageError("s3://key:SECRET@bucket/a: cannot be read")),
            "failure",
            "validate_data: config or usage error (12): s3://***@bucket/a: cannot be read",
        ),
        # A program that crashed may have printed a row last.
        (
            Ending.from_exit_code("validate_data", 1, 'KeyError: "my card number is CANARY"'),
            "failure",
            "validate_data: internal error (1); see the task's log",
        ),
        (Ending.from_exit_code("validate_data", -9, "CANARY"), "failure", "validate_data: ended by signal 9 (-9); see"),
        (None, "failure", "validate_data: stopped without a reason"),
    ],
    ids=["refused", "usage", "crash", "killed", "no ending"],
)
def test_a_failure_is_told_by_its_first_line_and_by_nothing_that_a_program_printed(
    made_plan: Plan, ops: Any, ending: Ending | None, event: str, sentence: str
) -> None:
    if ending:
        run_endings.write_to_store(made_plan.root, made_plan.run_id, ending)
    context = context_of(made_plan, validate_data="failed", train_qlora="upstream_failed", publish="upstream_failed")
    tell(context)
    (document,) = ops.documents
    assert document["type"] == f"run.{event}"
    assert document["data"]["sentence"].startswith(sentence)
    assert "second line" not in json.dumps(document)
    # A word, for the run's id and its time have any digits.
    assert "CANARY" not in json.dumps(document)
    assert "SECRET" not in json.dumps(document)

    tell(context, pause_after=3)
    assert "paused after 3 failed runs in a row" in ops.documents[1]["data"]["sentence"]


def test_a_run_that_was_stopped_by_hand_and_one_without_a_plan_are_failures(made_plan: Plan, ops: Any) -> None:
    tell(context_of(made_plan, evaluate="skipped", publish="skipped"))
    tell(context_of(None, plan="failed", validate_data="upstream_failed"))
    tell(context_of(made_plan, quantize_model="skipped", validate_data="skipped", train_qlora="failed"))
    sentences = [d["data"]["sentence"].partition(":")[0] for d in ops.documents]
    assert sentences == ["evaluate", "plan", "train_qlora"]


def test_who_asked_for_a_verdict_gets_no_failure(made_plan: Plan, ops: Any) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    with pytest.raises(AirflowSkipException, match="failure: nobody asked"):
        tell(context_of(made_plan, plan="failed"), events=("refused", "published"))
    assert ops.requests == []


def test_a_store_that_cannot_be_read_keeps_no_message_back(
    made_plan: Plan, ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    monkeypatch.setenv("QLORA_RETRAIN_ROOT", "s3:///no-bucket")
    tell(context_of(made_plan, validate_data="failed"))
    assert "validate_data: failed, and the store cannot say why" in ops.documents[0]["data"]["sentence"]
    # Of a run that succeeded nothing is claimed.
    (Path(made_plan.root.removeprefix("file://")) / "runs" / made_plan.run_id / "plan.json").unlink()
    with pytest.raises(AirflowFailException):
        tell(context_of(made_plan))
    assert len(ops.requests) == 1


def test_only_what_may_help_is_tried_again(made_plan: Plan, ops: Any) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    ops.statuses = [503, 404]
    context = context_of(made_plan, plan="failed")
    with pytest.raises(AirflowException, match="connection ops: the server answered 503") as caught:
        tell(context)
    assert not isinstance(caught.value, AirflowFailException)
    with pytest.raises(AirflowFailException, match="connection ops: the server answered 404"):
        tell(context)


# The deadline.


def deadline_context(state: str, end_date: str | None) -> dict[str, Any]:
    dag_run = {"dag_id": "tickets", "dag_run_id": "manual__1", "state": state, "end_date": end_date}
    return {"dag_run": dag_run, "deadline": {"id": "x", "deadline_time": "2026-01-31T05:00:00+00:00"}}


@pytest.mark.parametrize(
    ("state", "end_date", "sentence"),
    [
        ("running", None, "the run has not ended by its deadline"),
        ("failed", "2026-01-31T05:00:01Z", "the run was stopped at its deadline"),
        ("failed", "2026-01-31T04:00:00Z", None),
    ],
)
def test_a_run_that_is_late_is_told_and_one_that_failed_in_time_is_not(
    ops: Any, state: str, end_date: str | None, sentence: str | None
) -> None:
    from qlora_retrain.runtimes.airflow import deadline_notice

    asyncio.run(
        deadline_notice.tell(
            line="tickets", kind="webhook", connection="ops", to=[], context=deadline_context(state, end_date)
        )
    )
    assert [d["data"]["sentence"].startswith(sentence or "") for d in ops.documents] == [True] * bool(sentence)


# What the DAG gets.


def load_dags(folder: Path, monkeypatch: pytest.MonkeyPatch, **platform: object) -> ModuleType:
    (folder / "lines").mkdir(exist_ok=True)
    (folder / "lines" / "tickets.yaml").write_text("line: tickets\nsources: {raw_data: a.jsonl, base_model: model}\n")
    (folder / "lines" / "mails.yaml").write_text("line: [")
    (folder / "platform.yaml").write_text(yaml.safe_dump(platform))
    monkeypatch.setenv("QLORA_RETRAIN_PIPELINES", str(folder / "lines"))
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(folder / "platform.yaml"))
    spec = importlib.util.spec_from_file_location("dag_file", DAG_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_settings_the_dag_has_no_task_of_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dag = load_dags(tmp_path, monkeypatch).DAGS["tickets"]
    assert {task.task_id for task in dag.tasks} == {graph.PLAN_TASK, *(s.name for s in graph.STEPS)}
    assert (dag.deadline, dag.max_consecutive_failed_dag_runs) == (None, 0)


def test_each_line_gets_its_own_tasks_which_never_change_how_its_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    mail = {"connection": "mail", "kind": "email"}
    dags = load_dags(
        tmp_path,
        monkeypatch,
        runtime={"pause_after_failures": 3, "deadline_hours": 5},
        notify=[
            {"events": ["failure", "deadline"], "connection": "ops", "kind": "webhook"},
            {"events": ["failure"], "to": ["a@example.com"], **mail},
            {"events": ["refused"], "to": ["b@example.com"], "line": "tickets", **mail},
            {"events": ["deadline"], "connection": "late", "kind": "apprise"},
            {"events": ["failure"], "connection": "another", "kind": "apprise", "line": "letters"},
        ],
        hooks=[{"line": "tickets", "connection": "server"}, {"line": "letters", "connection": "second"}],
    ).DAGS
    dag = dags["tickets"]
    names = {"notify_ops", "notify_mail", "notify_mail_2", "hook_server"}
    added = {task.task_id: task for task in dag.tasks if task.task_id.startswith(("notify", "hook"))}
    assert set(added) == names
    for task in added.values():
        assert task.upstream_task_ids == {"publish"}
        assert task.is_teardown
        assert not task.on_failure_fail_dagrun
        assert (task.retries, task.retry_exponential_backoff) == (4, 2.0)
        assert task.template_fields == ()
    assert dag.max_consecutive_failed_dag_runs == 3
    assert [(alert.interval, alert.callback.kwargs["connection"]) for alert in dag.deadline] == [
        (timedelta(hours=5), "ops"),
        (timedelta(hours=5), "late"),
    ]
    # A file that cannot be used is somebody's to know.
    assert "broken" in dags["mails"].tags
    assert {t.task_id for t in dags["mails"].tasks} == {"plan", "notify_ops", "notify_mail"}
    for item in dags.values():
        DagSerialization.to_dict(item)


def test_a_run_without_a_deadline_of_its_own_has_that_of_its_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notify = [{"events": ["deadline"], "connection": "ops", "kind": "webhook"}]
    dag = load_dags(tmp_path, monkeypatch, notify=notify).DAGS["tickets"]
    assert [alert.interval for alert in dag.deadline] == [dag.dagrun_timeout]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("notify: [{events: [], connection: a, kind: webhook}]", "notify.0.events"),
        ("notify: [{events: [unchanged], connection: a, kind: webhook}]", "notify.0.events.0"),
        ("notify: [{events: [failure], connection: a.b, kind: webhook}]", "notify.0.connection"),
        ("notify: [{events: [failure], connection: a, kind: email}]", "lists the addresses for kind: email"),
        ("notify: [{events: [failure], connection: a, kind: webhook, to: [a@b.c]}]", "leave it out for any other kind"),
        ('notify: [{events: [failure], connection: a, kind: email, to: ["a@b.c\\nBcc: d@e.f"]}]', "notify.0.to.0"),
        ("notify: [{events: [failure], connection: a, kind: webhook, url: 'https://x'}]", "notify.0.url"),
        ("hooks: [{connection: a}]", "hooks.0.line"),
        ("hooks: [{line: Tickets, connection: a}]", "hooks.0.line"),
    ],
)
def test_a_wrong_entry_is_refused_by_its_place(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "platform.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_section(PlatformConfig, tmp_path / "platform.yaml")
    assert fault in str(caught.value)
