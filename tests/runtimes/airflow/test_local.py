"""Airflow's operators with real plans and real subprocesses, in a project whose steps are tiny programs."""

from __future__ import annotations

import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_retrain.core import endings, graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause
from qlora_retrain.pipeline import code_identity, run_endings
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, open_store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
# Every step runs `behaviour.py` of the project, and adds its arguments as a line to `runs`.
PROGRAM = """
import pathlib, runpy, sys
with open("runs", "a") as log:
    print(*sys.argv[1:], file=log)
runpy.run_path("behaviour.py", init_globals={"step": pathlib.Path(__file__).parent.name})
"""
Context = dict[str, Any]


@pytest.fixture
def project(tmp_path: Path, tickets: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project folder with a tiny program for every step, a line and a store."""
    root = tmp_path / "project"
    for step in graph.STEPS:
        folder = root / "components" / step.name
        folder.mkdir(parents=True)
        (folder / "__main__.py").write_text(PROGRAM)
    shutil.copy(code_identity.project_root() / "constraints.txt", root)
    (root / "line.yaml").write_text(f"line: tickets\nsources: {{raw_data: {tickets}, base_model: {tiny_model}}}\n")
    monkeypatch.setattr(code_identity, "project_root", lambda: root)
    monkeypatch.setenv("QLORA_RETRAIN_ROOT", (tmp_path / "store").as_uri())
    code_identity.code_hash.cache_clear()
    yield root
    code_identity.code_hash.cache_clear()


@pytest.fixture
def context() -> Context:
    return dag_run_context("manual__../../etc")


def dag_run_context(run_id: str, *, try_number: int = 1, **params: object) -> Context:
    from airflow.sdk.execution_time.context import OutletEventAccessors

    # An asset-triggered run: no logical date.
    dag_run = SimpleNamespace(
        dag_id="tickets", run_id=run_id, run_after=datetime(2026, 1, 31, 3, tzinfo=UTC), logical_date=None
    )
    events = OutletEventAccessors()
    # What the tasks of the run returned, by task.
    xcom: dict[str, str] = {}
    notes: list[str] = []

    def xcom_pull(task_ids: str) -> str | None:
        return xcom.get(task_ids)

    def xcom_push(key: str, value: str) -> None:
        assert key == "qlora_retrain_note"
        notes.append(value)

    return {
        "dag_run": dag_run,
        "params": params,
        "ti": SimpleNamespace(try_number=try_number, xcom=xcom, notes=notes, xcom_pull=xcom_pull, xcom_push=xcom_push),
        "outlet_events": events,
    }


def plan_task(project: Path) -> Any:
    from qlora_retrain.runtimes.airflow.operators import PlanOperator

    return PlanOperator(task_id="plan", config_path=project / "line.yaml")


def run_plan_task(project: Path, context: Context) -> Plan:
    """Run task 0, and keep what it returns as Airflow does."""
    context["ti"].xcom["plan"] = plan_task(project).execute(context)
    return Plan.load(context["ti"].xcom["plan"])


def step_task(step: str = "validate_data") -> Any:
    from qlora_retrain.runtimes.airflow.local import LocalStepOperator

    return LocalStepOperator(task_id=step, step=step, line="tickets")


@pytest.fixture
def plan(project: Path, context: Context) -> Plan:
    return run_plan_task(project, context)


@pytest.fixture
def write_program(project: Path, plan: Plan) -> Callable[[str], None]:
    def write(program: str) -> None:
        (project / "behaviour.py").write_text(program)

    return write


MAKE_ARTIFACT = """
import pathlib, sys, tempfile
from qlora_retrain.core import endings, graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause
from qlora_retrain.storage import artifact
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store

def make(uri, step, refused=None, **numbers):
    plan = Plan.load(uri)
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "file").write_text("x")
    planned = plan.step(step)
    manifest = artifact.Manifest(
        artifact=graph.step(step).makes, key=planned.key, step=step, attempt="a1", numbers=numbers, reason=refused,
        outcome="refused" if refused else "done", exit_code=10 if refused else 0, files=artifact.list_files(folder),
        inputs=planned.inputs, config=planned.identity, code=planned.code, provenance={},
    )
    artifact.complete(open_store(plan.root), folder, manifest, line=plan.line)
"""
# The least that a step must do: complete its artifact, as the real runner would.
COMPLETE_ARTIFACT = MAKE_ARTIFACT + "make(sys.argv[2], step, published=True, moved=False, version='v1')\n"


def make(plan: Plan, step: str, **numbers: Any) -> None:
    """Complete the artifact of a step in this process."""
    names: dict[str, Any] = {}
    exec(MAKE_ARTIFACT, names)
    names["make"](plan.uri, step, **numbers)


def test_a_cleared_run_keeps_its_plan_and_another_makes_its_own(project: Path, context: Context, plan: Plan) -> None:
    assert plan.run_id.startswith("20260131T030000Z-")
    assert ".." not in plan.uri

    line = project / "line.yaml"
    line.write_text(line.read_text() + "train: {rank: 4}\n")
    assert run_plan_task(project, context) == plan
    assert run_plan_task(project, dag_run_context("manual__2")).step("train_qlora").config["rank"] == 4


def test_a_field_changed_in_the_form_is_in_the_plan_and_the_others_are_the_lines(project: Path) -> None:
    changed = dag_run_context("manual__3", **{"train.learning_rate": 5e-5, "train.rank": 16})
    assert run_plan_task(project, changed).step("train_qlora").config["learning_rate"] == 5e-5


def test_another_run_can_be_finished_but_not_another_lines(
    project: Path, plan: Plan, write_program: Callable[[str], None]
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    write_program(COMPLETE_ARTIFACT)
    resumed = dag_run_context("manual__4", resume_run=plan.run_id)
    assert run_plan_task(project, resumed) == plan
    step_task().execute(resumed)
    assert (project / "runs").read_text() == f"--plan {plan.uri} --line tickets --root {plan.root}\n"
    line = project / "line.yaml"
    line.write_text(line.read_text().replace("line: tickets", "line: mails"))
    with pytest.raises(AirflowFailException, match=f"run {plan.run_id} is of line tickets"):
        plan_task(project).execute(resumed)


def test_no_exception_that_airflow_logs_holds_what_the_url_of_a_server_holds(
    project: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.sdk.exceptions import AirflowException

    monkeypatch.setenv("QLORA_RETRAIN_ROOT", "s3://bucket/store")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:canary7731@127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary7731")
    with pytest.raises(AirflowException) as failed:
        plan_task(project).execute(context)
    assert "canary7731" not in "".join(traceback.format_exception(failed.value))


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("evaluate: {max_loss_to_champion: 0.5}", "", "evaluate.max_loss_to_champion is 0.5, and 0.02 in the line"),
        ("evaluate: {allow_first_release: true}", "", "evaluate.allow_first_release is true, and false"),
        ("publish: {promote_to: latest2}", "", 'publish.promote_to is "latest2", and "production"'),
        ("", "evaluate: {min_accuracy: 0.9}", "evaluate.min_accuracy is null, and 0.9"),
        ("", "data: {min_eval_prompts: 99}", "data.min_eval_prompts is 30, and 99"),
        ("data: {eval_fraction: 0.01}", "", 'data.eval_fraction is 0.01, and "auto"'),
        ("data: {min_golden_prompts: 2}", "", "data.min_golden_prompts is 2, and 1"),
        ("merge: {max_kl_nats: null}", "merge: {max_kl_nats: 0.1}", "merge.max_kl_nats is null, and 0.1"),
        ("", "sources: {raw_data: RAW, base_model: BASE, golden_data: RAW}", "sources.golden_data is null, and "),
        ("train: {rank: 4}", "train: {max_steps: 9, micro_batch_size: 2}", None),
        ("", "evaluate: {max_loss_to_champion: 0.5, allow_first_release: true}", None),
        ("publish: {promote_to: null}", "", None),
    ],
)
def test_a_run_that_was_planned_with_other_gates_is_not_finished_from_the_form(
    project: Path, before: str, after: str, fault: str | None
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    line = project / "line.yaml"
    name, sources = line.read_text().splitlines()
    raw, base = (part.split()[1].strip(",}") for part in sources.split(": ", 1)[1].strip("{}").split(", "))
    line.write_text(f"{name}\n{sources}\n{before}\n")
    plan = run_plan_task(project, dag_run_context("manual__5"))
    after = after.replace("RAW", raw).replace("BASE", base)
    line.write_text("\n".join([name, "" if after.startswith("sources") else sources, after, ""]))
    resumed = dag_run_context("manual__6", resume_run=plan.run_id)
    if fault is None:
        assert run_plan_task(project, resumed) == plan
        return
    with pytest.raises(AirflowFailException) as refused:
        plan_task(project).execute(resumed)
    assert f"run {plan.run_id}: {fault}" in str(refused.value)


@pytest.mark.parametrize(
    ("user", "run_type", "expected"),
    [
        ("alice@example.org", "manual", "airflow:alice@example.org"),
        ("a via sts:x", "manual", "airflow:a%20via%20sts%3Ax"),
        (None, "scheduled", "airflow-run:scheduled"),
    ],
)
def test_publish_is_told_who_triggered_the_run_by_airflow_and_not_by_the_form(
    plan: Plan,
    context: Context,
    write_program: Callable[[str], None],
    project: Path,
    user: str | None,
    run_type: str,
    expected: str,
) -> None:
    from airflow.sdk.api.datamodels._generated import DagRunType

    write_program(COMPLETE_ARTIFACT)
    context["dag_run"].triggering_user_name, context["dag_run"].run_type = user, DagRunType(run_type)
    reason = "$(AWS_SECRET_ACCESS_KEY) --alias production\n{{ 7 * 7 }}"
    context["dag_run"].conf = context["params"] = {"triggering_user_name": "mallory", "reason": reason}
    for step in ("validate_data", "publish"):
        step_task(step).execute(context)
    assert (project / "runs").read_text().split("\n")[:-1] == [
        f"--plan {plan.uri} --line tickets --root {plan.root}",
        f"--plan {plan.uri} --line tickets --root {plan.root} --alias * --triggered-by {expected} "
        # One argument, in which neither Kubernetes nor a template finds anything to put a value in place of.
        "--reason=%24%28AWS_SECRET_ACCESS_KEY%29%20--alias%20production%20%7B%7B%207%20%2A%207%20%7D%7D",
    ]


@pytest.mark.parametrize(
    ("options", "root", "fault"),
    [
        ({"line": "mails"}, None, "expected a plan of line mails, found one of tickets"),
        ({"alias": "staging"}, None, "moves the alias production, and staging may be moved"),
        ({"alias": None}, None, "moves the alias production, and no alias may be moved"),
        ({}, "file:///elsewhere", "expected a plan in file:///elsewhere"),
    ],
)
def test_line_store_and_alias_are_those_that_the_task_was_made_for_whatever_its_plan_says(
    context: Context,
    write_program: Callable[[str], None],
    project: Path,
    options: dict[str, Any],
    root: str | None,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from qlora_retrain.runtimes.airflow.local import LocalStepOperator

    write_program(COMPLETE_ARTIFACT)
    if root:
        monkeypatch.setenv("QLORA_RETRAIN_ROOT", root)
    task = LocalStepOperator(task_id="publish", **{"step": "publish", "line": "tickets", **options})
    with pytest.raises(AirflowFailException, match=rf"\(13\).*{fault}"):
        task.execute(context)
    assert not (project / "runs").exists()


def test_a_step_has_its_own_roles_credentials_and_without_them_it_does_not_run(
    plan: Plan,
    context: Context,
    write_program: Callable[[str], None],
    tmp_path: Path,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    (tmp_path / "roles").mkdir()
    (tmp_path / "roles" / "validate_data").touch()
    monkeypatch.setenv("QLORA_RETRAIN_CREDENTIALS", str(tmp_path / "roles"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-worker")
    names = ("AWS_SHARED_CREDENTIALS_FILE", "AWS_SECRET_ACCESS_KEY", "QLORA_RETRAIN_CREDENTIALS")
    write_program(COMPLETE_ARTIFACT + f"import os\nprint(*map(os.environ.get, {names}), file=open('seen', 'w'))\n")
    step_task("validate_data").execute(context)
    assert (project / "seen").read_text() == f"{tmp_path}/roles/validate_data None None\n"
    with pytest.raises(AirflowFailException, match=r"\(12\).*publish-tickets is not there"):
        step_task("publish").execute(context)


def test_a_plan_that_was_changed_after_task_0_runs_no_step(
    plan: Plan, context: Context, write_program: Callable[[str], None], project: Path
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    write_program(COMPLETE_ARTIFACT)
    file = Path(plan.uri.removeprefix("file://").partition("#")[0])
    # Operational, so that the plan's keys are those of before.
    file.write_text(file.read_text().replace('"log_every_steps": ', '"log_every_steps": 1'))
    with pytest.raises(AirflowFailException, match=r"integrity or security \(13\).*changed since it was made"):
        step_task().execute(context)
    assert not (project / "runs").exists()


def test_a_step_whose_task_0_left_nothing_says_what_to_clear(project: Path) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match=r"task plan of this run has left no plan; clear that task"):
        step_task().execute(dag_run_context("manual__5"))


def test_a_config_error_fails_the_plan_at_once_with_every_line(project: Path, context: Context) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    line = project / "line.yaml"
    line.write_text(line.read_text() + "train: {rank: 0, lerning_rate: 1}\n")
    with pytest.raises(AirflowFailException) as caught:
        plan_task(project).execute(context)
    assert "train.rank" in str(caught.value)
    assert "did you mean learning_rate?" in str(caught.value)


@pytest.mark.parametrize(
    ("ending", "retried", "reason"),
    [
        ("sys.exit(1)", False, r"internal error \(1\)"),
        ("sys.exit(10)", False, r"data refused \(10\)"),
        ("sys.exit(11)", False, r"quality refused or insufficient evidence \(11\)"),
        ("sys.exit(12)", False, r"config or usage error \(12\)"),
        ("sys.exit(13)", False, r"integrity or security \(13\)"),
        ("sys.exit(14)", False, r"training diverged \(14\)"),
        ("sys.exit(75)", True, r"try again \(75\)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", True, r"out of memory \(137\)"),
        ("os.kill(os.getpid(), signal.SIGUSR1)", True, r"ended by signal 10 \(138\)"),
    ],
)
def test_an_exit_code_ends_the_task_as_the_table_says(
    write_program: Callable[[str], None], context: Context, ending: str, retried: bool, reason: str
) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    write_program(
        f"import os, signal, sys\nprint('working')\nprint('validate_data: because of x', flush=True)\n{ending}"
    )
    with pytest.raises(
        AirflowException, match=reason + ": validate_data: because of x\nbefore that: working$"
    ) as caught:
        step_task().execute(context)
    assert isinstance(caught.value, AirflowFailException) is not retried


def test_the_ending_that_a_step_wrote_is_the_tasks_and_is_kept_in_the_runs_folder(
    write_program: Callable[[str], None], plan: Plan, context: Context
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    ending = Ending(137, Cause.GPU_OOM, "the GPU ran out of memory", "validate_data", "ab" * 32, "attempt-1")
    write_program(f"import sys\nprint({endings.MARK + ending.as_json()!r})\nprint('more output')\nsys.exit(137)")
    with pytest.raises(AirflowFailException) as caught:
        step_task().execute(context)
    assert str(caught.value) == "out of memory (137): the GPU ran out of memory"
    assert run_endings.read(open_store(plan.root), plan.run_id, "validate_data") == ending


def test_an_earlier_trys_ending_is_gone_once_the_next_begins(
    write_program: Callable[[str], None], plan: Plan, context: Context
) -> None:
    run_endings.write_to_store(plan.root, plan.run_id, Ending(75, Cause.THROTTLED, "busy", "validate_data"))
    # A program that never gets as far as to remove the ending itself.
    write_program(COMPLETE_ARTIFACT)
    step_task().execute(context)
    assert run_endings.read(open_store(plan.root), plan.run_id, "validate_data") is None


def test_a_mistyped_run_is_refused_and_nothing_is_written_there(project: Path, tmp_path: Path) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    context = dag_run_context("manual__6", resume_run="20260131T030000Z-0123456789ab")
    with pytest.raises(AirflowFailException, match="there is no plan here"):
        plan_task(project).execute(context)
    assert not (tmp_path / "store/runs/20260131T030000Z-0123456789ab").exists()


def test_an_ending_that_does_not_fit_the_exit_code_does_not_count(
    write_program: Callable[[str], None], context: Context
) -> None:
    from airflow.sdk.exceptions import AirflowException

    ending = Ending(0, None, "", "validate_data")
    write_program(f"import sys\nprint({endings.MARK + ending.as_json()!r})\nprint('more output')\nsys.exit(75)")
    with pytest.raises(AirflowException, match=r"try again \(75\): more output"):
        step_task().execute(context)


def test_a_made_artifact_starts_no_process(project: Path, plan: Plan, context: Context) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    make(plan, "quantize_model")
    make(plan, "validate_data", refused="7 % of the rows are bad")
    step_task("quantize_model").execute(context)
    with pytest.raises(AirflowFailException, match=r"data refused \(10\): as before: 7 % of the rows are bad"):
        step_task("validate_data").execute(context)
    assert not (project / "runs").exists()


def test_a_step_gets_no_setting_of_airflow_and_runs_in_the_project(
    project: Path, write_program: Callable[[str], None], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://user:secret@host/db")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    write_program(
        "import os, pathlib\nassert os.environ['AWS_REGION'] == 'eu-west-1'\n"
        "assert not [k for k in os.environ if 'AIRFLOW' in k]\npathlib.Path('here').touch()\n" + COMPLETE_ARTIFACT
    )
    step_task().execute(context)
    assert (project / "here").exists()


def test_a_killed_task_lets_its_step_save_and_is_tried_again(
    project: Path, write_program: Callable[[str], None], context: Context
) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    write_program(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), sys.exit(75)))\n"
        "pathlib.Path('ready').touch()\ntime.sleep(60)"
    )
    task = step_task()

    # Airflow calls `on_kill` in the signal handler of the task's process; a thread does it here.
    def kill() -> None:
        while not (project / "ready").exists():
            time.sleep(0.05)
        task.on_kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(AirflowException, match=r"try again \(75\)") as caught:
        task.execute(context)
    thread.join()
    assert not isinstance(caught.value, AirflowFailException)
    assert (project / "saved").exists()


def test_the_asset_event_is_emitted_only_for_a_new_version(
    write_program: Callable[[str], None], plan: Plan, context: Context
) -> None:
    from airflow.sdk import AssetAlias

    def events_of(task_context: Context) -> list[Any]:
        return list(task_context["outlet_events"][AssetAlias("tickets")].asset_alias_events)

    write_program(COMPLETE_ARTIFACT.replace("published=True", "published=False"))
    step_task("publish").execute(context)
    assert events_of(context) == []  # the content equals an earlier version's

    artifact.drop(open_store(plan.root), "release", plan.step("publish").key)
    write_program(COMPLETE_ARTIFACT)
    step_task("publish").execute(context)
    event = events_of(context)[0]
    assert event.dest_asset_key.uri == f"{plan.root}/models/tickets"
    assert event.extra == {
        "version": "v1", "published": True, "moved": False, "alias": None, "metrics": {},
        "key": plan.step("publish").key, "run": plan.run_id,
    }  # fmt: skip

    first_try, second_try = (
        dag_run_context(context["dag_run"].run_id),
        dag_run_context(context["dag_run"].run_id, try_number=2),
    )
    for again in (first_try, second_try):
        again["ti"].xcom.update(context["ti"].xcom)
    step_task("publish").execute(first_try)
    assert events_of(first_try) == []  # another run published it, and emitted the event
    step_task("publish").execute(second_try)
    # The first try may have died between publishing and emitting the event.
    assert [e.extra for e in events_of(second_try)] == [event.extra]


def test_a_step_that_ends_well_without_its_artifact_fails(
    write_program: Callable[[str], None], context: Context
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    write_program("")
    with pytest.raises(AirflowFailException, match="validate_data exited with 0, but its dataset is not in the store"):
        step_task().execute(context)


def test_output_without_a_line_break_does_not_fill_the_memory(
    write_program: Callable[[str], None], context: Context
) -> None:
    write_program(
        "import sys\nfor _ in range(64): sys.stdout.write('x' * 65536)\nsys.stdout.buffer.write(b'\\xff')\n"
        + COMPLETE_ARTIFACT
    )
    step_task().execute(context)


SLOW = """
import pathlib, signal, sys, time
def stop(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("slow", flush=True)
pathlib.Path("begun").touch()
time.sleep(60)
"""


def let_time_run_out_once(path: Path) -> None:
    """Send the signal of Airflow's timer as soon as there is a file, however long the machine takes to that point."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    threading.Thread(target=wait, daemon=True).start()


def test_a_step_is_stopped_at_its_deadline_after_it_saved_its_work_and_not_tried_again(
    project: Path, plan: Plan, context: Context, write_program: Callable[[str], None]
) -> None:
    from airflow.sdk.exceptions import AirflowFailException
    from airflow.sdk.execution_time.timeout import timeout

    write_program(SLOW)
    task = step_task()
    let_time_run_out_once(project / "begun")
    # As Airflow's task runner does it.
    message = r"\(12\): stopped at its deadline.*runtime\.max_step_hours"
    with pytest.raises(AirflowFailException, match=message), timeout(3600):
        task.execute(context)
    assert task._process.returncode == 75
    ending = run_endings.read(open_store(plan.root), plan.run_id, "validate_data")
    assert ending is not None
    assert (ending.code, ending.cause) == (12, Cause.TIME_BUDGET)


def test_training_gets_the_time_that_the_runs_own_budget_says(project: Path) -> None:
    changed = dag_run_context("manual__5", **{"train.max_hours": 7})
    run_plan_task(project, changed)
    training, evaluation = step_task("train_qlora"), step_task("evaluate")
    for task in (training, evaluation):
        task.pre_execute(changed)
    assert training.execution_timeout == timedelta(hours=7 + 2)
    assert evaluation.execution_timeout == timedelta(hours=24)


def test_a_dry_run_plans_says_what_would_run_and_writes_nothing(project: Path, tmp_path: Path) -> None:
    from airflow.sdk import DAG
    from airflow.sdk.exceptions import AirflowSkipException, DownstreamTasksSkipped

    context = dag_run_context("manual__7", dry_run=True, **{"train.rank": 4})
    with DAG("tickets"):
        plan_operator, task = plan_task(project), step_task()
        plan_operator >> task >> step_task("train_qlora")
    with pytest.raises(DownstreamTasksSkipped) as skipped:
        plan_operator.execute(context)
    assert skipped.value.tasks == ["train_qlora", "validate_data"]
    assert not (tmp_path / "store").exists()
    (note,) = context["ti"].notes
    assert note.splitlines()[:2] == [
        "Dry run: no step ran.", "validate_data: would run: no earlier run of this line"
    ]  # fmt: skip

    # A person may clear a skipped task.
    with pytest.raises(AirflowSkipException, match="this run is a dry run; start another one"):
        task.execute(context)
    assert not (project / "runs").exists()


def test_a_dry_run_after_a_run_says_what_its_changes_would_run_again(project: Path, plan: Plan, tmp_path: Path) -> None:
    from airflow.sdk.exceptions import DownstreamTasksSkipped

    # What a run that is begun again writes is named by the time, and the plan was made in this very second.
    shutil.rmtree(tmp_path / "store" / "runs" / plan.run_id / "renewed")
    before = sorted((tmp_path / "store").rglob("*"))
    context = dag_run_context("manual__8", dry_run=True, **{"train.rank": 4})
    with pytest.raises(DownstreamTasksSkipped):
        plan_task(project).execute(context)
    assert "train_qlora: would run: " in context["ti"].notes[0]
    assert "train.rank was 16, is 4" in context["ti"].notes[0]
    assert "quantize_model: would run: planned before, but never finished" in context["ti"].notes[0]
    # Also of the plan of another run, which is there already.
    resumed = dag_run_context("manual__9", dry_run=True, resume_run=plan.run_id)
    with pytest.raises(DownstreamTasksSkipped):
        plan_task(project).execute(resumed)
    assert "train_qlora: would run" in resumed["ti"].notes[0]
    assert sorted((tmp_path / "store").rglob("*")) == before


def test_a_dry_run_refuses_what_a_run_would_refuse(project: Path) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    line = project / "line.yaml"
    line.write_text(line.read_text() + "train: {rank: 0}\n")
    context = dag_run_context("manual__10", dry_run=True)
    with pytest.raises(AirflowFailException, match=r"config or usage error \(12\)"):
        plan_task(project).execute(context)
    assert context["ti"].notes[0].startswith("plan: config or usage error (12): ")


def test_the_last_step_and_a_failed_one_leave_the_runs_note(
    plan: Plan, context: Context, write_program: Callable[[str], None]
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    write_program(COMPLETE_ARTIFACT)
    step_task("validate_data").execute(context)
    assert context["ti"].notes == []
    for step in graph.STEPS[1:]:
        step_task(step.name).execute(context)
    assert context["ti"].notes == ["Published v1."]
    write_program("import sys\nprint('no label', flush=True)\nsys.exit(10)")
    artifact.drop(open_store(plan.root), "dataset", plan.step("validate_data").key)
    with pytest.raises(AirflowFailException):
        step_task("validate_data").execute(context)
    assert context["ti"].notes[1:] == ["validate_data: data refused (10): no label"]


def test_the_reason_is_the_first_error_of_the_log(
    write_program: Callable[[str], None], plan: Plan, context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    from airflow.sdk.exceptions import AirflowException

    write_program("import sys\nprint('busy', flush=True)\nsys.exit(75)")
    with pytest.raises(AirflowException):
        step_task().execute(context)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["try again (75): busy"]
