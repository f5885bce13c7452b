"""The Airflow DAGs equal the graph, and one bad file breaks no other line."""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from qlora_retrain.core import endings, graph
from qlora_retrain.runtimes.airflow import params as form
from qlora_retrain.runtimes.airflow.move_request import DAG_IDS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
DAG_FILE = Path(__file__).resolve().parents[2] / "dags" / "retrain.py"
LINE = """
line: {line}
schedule: {schedule}
sources: {{raw_data: tickets.jsonl, base_model: model}}
train: {{learning_rate: 3e-4, max_steps: 7}}
"""


@pytest.fixture
def pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_RETRAIN_PIPELINES", str(tmp_path))
    return tmp_path


def write(folder: Path, name: str, line: str, schedule: str = "null") -> Path:
    path = folder / name
    path.write_text(LINE.format(line=line, schedule=schedule))
    return path


def load() -> ModuleType:
    """Load the DAG file as Airflow's DAG processor does: as a fresh module."""
    spec = importlib.util.spec_from_file_location("dag_file", DAG_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_dag_in_the_folder_is_one_that_airflow_accepts(tmp_path: Path) -> None:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(DAG_FILE.parent))
    assert bag.import_errors == {}
    lines = [path.stem for path in (DAG_FILE.parents[1] / "pipelines").glob("*.yaml")]
    assert sorted(bag.dags) == sorted([*lines, *DAG_IDS])
    assert not any("broken" in dag.tags for dag in bag.dags.values())


def test_the_dags_edges_are_the_graphs_and_the_plan_comes_first(pipelines: Path) -> None:
    write(pipelines, "tickets.yaml", "tickets")
    dag = load().DAGS["tickets"]
    edges = {(up, task.task_id) for task in dag.tasks for up in task.upstream_task_ids}
    roots = {s.name for s in graph.STEPS if not graph.upstream_steps(s)}
    assert edges == {*graph.edges(), *((graph.PLAN_TASK, name) for name in roots)}
    assert {t.task_id: t.retries for t in dag.tasks if t.task_id != "plan"} == {s.name: s.retries for s in graph.STEPS}


def test_each_file_is_a_dag_with_its_schedule_one_run_at_a_time(pipelines: Path) -> None:
    from airflow.sdk import CronTriggerTimetable

    write(pipelines, "tickets.yaml", "tickets", '"0 3 * * 1"')
    write(pipelines, "mails.yaml", "mails")
    dags = load().DAGS
    assert sorted(dags) == ["mails", "tickets"]
    assert dags["tickets"].timetable == CronTriggerTimetable("0 3 * * 1", timezone="UTC", run_immediately=timedelta(0))
    assert dags["mails"].schedule is None
    assert {(d.max_active_runs, d.catchup) for d in dags.values()} == {(1, False)}


@pytest.mark.parametrize("kind", ["local", "docker"])
def test_gpu_steps_share_the_platforms_pool_and_all_tasks_have_the_lines_priority(
    pipelines: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(pipelines, "mails.yaml", "mails")
    path = write(pipelines, "tickets.yaml", "tickets")
    path.write_text(path.read_text().replace("max_steps: 7", "num_processes: 4"))
    platform_file = pipelines.parent / "platform.yaml"
    platform_file.write_text(f"runtime: {{kind: {kind}, gpu_pool: gpu}}\npriorities: {{tickets: 9}}\n")
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(platform_file))
    dags = load().DAGS

    slots = {task.task_id: (task.pool, task.pool_slots) for task in dags["tickets"].tasks}
    on_gpu = {name: (pool, number) for name, (pool, number) in slots.items() if pool == "gpu"}
    assert on_gpu == {"train_qlora": ("gpu", 4), "evaluate": ("gpu", 1)}
    weights = {
        line: {(task.priority_weight, task.weight_rule) for task in dags[line].tasks} for line in ("mails", "tickets")
    }
    # Not by the number of tasks behind it: then any line's plan would go before a step of the urgent line.
    assert weights["mails"] == {(1, "absolute")}
    assert weights["tickets"] == {(9, "absolute")}


def test_a_line_that_waits_for_data_is_a_dag_and_a_broken_one_waits_for_times_alone(pipelines: Path) -> None:
    write(pipelines, "tickets.yaml", "tickets", "{on_new_data: true}")
    bad = write(pipelines, "mails.yaml", "mails", "{cron: '0 3 * * 1', time_zone: Asia/Tokyo, on_new_data: true}")
    bad.write_text(bad.read_text() + "evaluate: {min_prompt: 3}\n")
    worse = write(pipelines, "notes.yaml", "notes", "{on_new_data: true}")
    worse.write_text(worse.read_text() + "evaluate: {min_prompt: 3}\n")
    dags = load().DAGS
    (asset,) = dags["tickets"].schedule
    assert asset.watchers[0].trigger.uri == (pipelines / "tickets.jsonl").as_uri()
    assert dags["mails"].timetable.expression == "0 3 * * 1"
    assert "broken" in dags["mails"].tags
    assert dags["notes"].schedule is None


@pytest.mark.parametrize("kind", ["local", "docker", "kubernetes"])
def test_every_task_and_every_run_has_a_deadline(pipelines: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_RETRAIN_PROFILE", str(DAG_FILE.parents[1] / "manifests" / "profiles" / "gpu.yaml"))
    path = write(pipelines, "tickets.yaml", "tickets")
    path.write_text(path.read_text().replace("max_steps: 7", "max_hours: 5"))
    platform_file = pipelines.parent / "platform.yaml"
    platform_file.write_text(f"runtime: {{kind: {kind}, max_step_hours: 3}}\n")
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(platform_file))
    (pipelines / "wrong.yaml").write_text("line: 1\n")
    dags = load().DAGS

    hours = {task.task_id: task.execution_timeout / timedelta(hours=1) for task in dags["tickets"].tasks}
    assert hours == {"plan": 3, **{step.name: 5 + 2 if step.scratch else 3 for step in graph.STEPS}}
    # By hand, training may have up to a week.
    assert dags["tickets"].dagrun_timeout == timedelta(hours=6 * 3 + 168 + 2)
    assert dags["tickets"].params.get_param("train.max_hours").schema["maximum"] == 168
    assert "broken" in dags["wrong"].tags
    assert dags["wrong"].dagrun_timeout
    assert all(task.execution_timeout for task in dags["wrong"].tasks)


def test_the_form_starts_at_the_lines_values(pipelines: Path) -> None:
    write(pipelines, "tickets.yaml", "tickets")
    params = load().DAGS["tickets"].params
    assert set(params) == {*form.KNOBS, "dry_run", "reason", "resume_run"}
    assert (params["train.learning_rate"], params["train.max_steps"], params["resume_run"]) == (3e-4, 7, None)


@pytest.mark.parametrize("kind", ["local", "kubernetes"])
def test_what_a_person_sees_is_in_words_and_each_step_has_its_contract(
    pipelines: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_RETRAIN_PROFILE", str(DAG_FILE.parents[1] / "manifests" / "profiles" / "gpu.yaml"))
    platform_file = pipelines.parent / "platform.yaml"
    platform_file.write_text(f"runtime: {{kind: {kind}}}\n")
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(platform_file))
    write(pipelines, "tickets.yaml", "tickets")
    dag = load().DAGS["tickets"]
    # With the line's own name, so that no line can pass for another.
    assert dag.dag_display_name == "Retrain tickets"
    assert dag.get_task("plan").task_display_name == "Plan the run"
    for step in graph.STEPS:
        task = dag.get_task(step.name)
        assert task.task_display_name == step.title
        doc = task.doc_md or ""
        assert doc.startswith(step.summary)
        assert f"Makes `{step.makes}`" in doc
        assert all(f"| `{source.name}` |" in doc for source in step.reads)
        assert f"is tried again {task.retries} times" in doc
        assert f"may take {task.execution_timeout / timedelta(hours=1):g} hours" in doc
        assert "| 11 | quality refused or insufficient evidence | fails at once, on purpose" in doc
        assert "| 75 | try again | is tried again |" in doc
        # Then the component's page, whose links to other files would lead nowhere.
        assert f"# {step.name}" in doc
        assert "](../" not in doc
        assert [link.name for link in task.operator_extra_links][-1] == "Run page"
    assert dag.get_task("evaluate").doc_md.count("](") == 0


def test_a_reason_is_bounded_and_a_dry_run_is_yes_or_no(pipelines: Path) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    write(pipelines, "tickets.yaml", "tickets")
    params = load().DAGS["tickets"].params
    assert (params["dry_run"], params["reason"]) == (False, None)
    assert params.get_param("reason").resolve("x" * 500) == "x" * 500
    for name, value in (("reason", "x" * 501), ("reason", 7), ("dry_run", "true"), ("dry_run", 1), ("dry_run", None)):
        with pytest.raises(ParamValidationError):
            params.get_param(name).resolve(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.learning_rate", 0),
        ("train.learning_rate", "1e-4; rm -rf /"),
        ("train.rank", 2.5),
        ("evaluate.allow_first_release", "yes"),
        ("publish.promote_to", "../production"),
        ("resume_run", "s3://key:secret@bucket/runs/x/plan.json"),
        ("resume_run", "../20260131T030000Z-0123456789ab"),
        ("resume_run", "--help"),
    ],
)
def test_the_form_refuses_what_the_plan_would_refuse(pipelines: Path, name: str, value: object) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    write(pipelines, "tickets.yaml", "tickets")
    param = load().DAGS["tickets"].params.get_param(name)
    with pytest.raises(ParamValidationError):
        param.resolve(value)


def test_a_bad_file_becomes_a_dag_that_fails_with_its_errors_on_its_schedule(
    pipelines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    monkeypatch.setenv("QLORA_RETRAIN_ROOT", (pipelines / "store").as_uri())
    write(pipelines, "tickets.yaml", "tickets")
    bad = write(pipelines, "mails.yaml", "mails", '"0 3 * * 1"')
    bad.write_text(bad.read_text() + "evaluate: {min_prompt: 3}\n")
    (pipelines / "c.yaml").write_text("line: [")
    dags = load().DAGS
    assert sorted(dags) == ["c", "mails", "tickets"]
    assert [name for name, dag in dags.items() if "broken" in dag.tags] == ["c", "mails"]
    assert "did you mean min_prompts?" in (dags["mails"].doc_md or "")
    assert dags["mails"].timetable.expression == "0 3 * * 1"
    dag_run = SimpleNamespace(dag_id="mails", run_id="x", run_after=datetime(2026, 1, 31, 3, tzinfo=UTC))
    context = {"dag_run": dag_run, "params": {}}
    with pytest.raises(AirflowFailException, match="did you mean min_prompts"):
        dags["mails"].get_task("plan").execute(context)
    with pytest.raises(AirflowFailException, match="not valid YAML"):
        dags["c"].get_task("plan").execute(context)

    (document,) = (pipelines / "store" / "runs").glob("*/endings/plan.json")
    ending = endings.from_json(document.read_text())
    assert ending is not None
    assert (ending.code, ending.cause, ending.step) == (12, "usage", "plan")


def test_a_bad_cron_is_refused(pipelines: Path) -> None:
    write(pipelines, "mails.yaml", "mails", '"99 3 * * 1"')
    assert "broken" in load().DAGS["mails"].tags


@pytest.mark.parametrize(
    "name", ["a.yaml", "tickets.yml", "tickets .yaml", "Tickets.yaml", "z.yaml", "tickets.yaml.yaml"]
)
def test_no_other_file_takes_over_a_line(pipelines: Path, name: str) -> None:
    write(pipelines, "tickets.yaml", "tickets", '"0 3 * * 1"')
    before = set(load().DAGS)
    write(pipelines, name, "tickets", '"59 23 * * *"')
    dags = load().DAGS
    assert dags["tickets"].timetable.expression == "0 3 * * 1"
    assert "broken" not in dags["tickets"].tags
    (new,) = set(dags) - before
    assert "is of line tickets, whose file is tickets.yaml" in (dags[new].doc_md or "")


def test_a_broken_file_never_has_the_id_of_a_line(pipelines: Path) -> None:
    (pipelines / "a b.yaml").write_text("line: [")
    (pipelines / "a+b.yaml").write_text("line: a-b")
    write(pipelines, "a-b.yaml", "a-b")
    dags = load().DAGS
    assert "broken" not in dags["a-b"].tags
    assert len(dags) == 3


@pytest.mark.parametrize("kind", ["docker", "kubernetes", "local"])
def test_nothing_that_a_line_says_is_rendered_as_a_template(
    pipelines: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    profile = pipelines / "profile.yaml.txt"
    profile.write_text("{}")
    monkeypatch.setenv("QLORA_RETRAIN_PROFILE", str(profile))
    path = write(pipelines, "tickets.yaml", "tickets")
    path.write_text(path.read_text() + "description: '{{ 7 * 7 }}'\n")
    platform = pipelines / "of the platform" / "platform.yaml"
    platform.parent.mkdir()
    platform.write_text(f"runtime: {{kind: {kind}}}\n")
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(platform))
    dag = load().DAGS["tickets"]
    assert "broken" not in dag.tags, dag.doc_md
    assert [(task.task_id, name) for task in dag.tasks for name in task.template_fields] == []


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "anchors and aliases"),
        ("line: &x tickets\nschedule: null\n", "anchors and aliases"),
        ("a: " + "[" * 33 + "]" * 33, "at most 32 levels"),
        ("a: " + "[" * 30_000, "at most 32 levels"),
        ("# " + "x" * 70_000, "at most 64 KiB"),
        ("schedule: 2026-13-45", "looks like a date or a number"),
        (f"line: {'9' * 5000}", "looks like a date or a number"),
    ],
    ids=["bomb", "anchor", "depth", "unclosed", "size", "date", "number"],
)
def test_a_hostile_file_costs_its_own_dag_alone(pipelines: Path, text: str, reason: str) -> None:
    write(pipelines, "tickets.yaml", "tickets")
    (pipelines / "evil.yaml").write_text(text)
    started = time.process_time()
    dags = load().DAGS
    assert time.process_time() - started < 20
    assert sorted(dags) == ["evil", "tickets"]
    assert reason in (dags["evil"].doc_md or "")
    assert "broken" not in dags["tickets"].tags


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"__file__.yaml", "x: 1"),
        (b"__spec__.yml", "x: 1"),
        (b"DAG.yaml", "x: 1"),
        (b"evil\xff.yaml", "x: 1"),
        (b"evil\x1b[2J\n.yaml", "x: 1"),
        (b"evil.yaml", LINE.format(line="evil", schedule="null").replace("7}", f"{10**30}}}")),
        (b"evil.yaml", LINE.format(line="evil", schedule="null").replace("7}", f"'{10**30}'}}")),
        (b"evil.yaml", LINE.format(line="evil", schedule="null").replace("7}", f"0x{'f' * 60_000}}}")),
        (b"evil.yaml", LINE.format(line="evil", schedule="null") + f"publish: {{licence: '{'MIT AND (' * 7_000}'}}"),
        (b"evil.yaml", LINE.format(line="evil", schedule="null") + 'data: {template: "a\\0.jinja"}'),
        (b"evil.yaml", LINE.format(line="evil", schedule="null") + 'description: "a\\0b"'),
        (b"evil.yaml", LINE.format(line="evil", schedule=f"{','.join(map(str, range(60)))} {'0-23,' * 50}1 * * *")),
        (b"evil.yaml", "train: {" + "".join(f"x{i}: 1, " for i in range(7_000)) + "}"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_what_airflow_hands_on_holds_every_line_beside_a_hostile_file(pipelines: Path, name: bytes, text: str) -> None:
    import msgspec
    from airflow.dag_processing.dagbag import DagBag
    from airflow.serialization.serialized_objects import DagSerialization
    from airflow.timetables.trigger import CronTriggerTimetable

    write(pipelines, "tickets.yaml", "tickets")
    Path(os.fsdecode(bytes(pipelines) + b"/" + name)).write_text(text)
    bag = DagBag(str(DAG_FILE))
    assert bag.import_errors == {}
    assert len(bag.dags) == 2
    assert "broken" not in bag.dags["tickets"].tags
    # The parsing process sends all DAGs of this file as one message.
    message = msgspec.msgpack.encode([DagSerialization.to_dict(dag) for dag in bag.dags.values()])
    assert len(message) < 300_000
    # The database has so much room, and takes no zero byte.
    assert b"\0" not in "".join(f"{dag.description}{dag.doc_md}" for dag in bag.dags.values()).encode()
    for dag in bag.dags.values():
        assert (
            len(CronTriggerTimetable(dag.schedule.expression, timezone="UTC").description if dag.schedule else "")
            <= 1_000
        )


def test_of_more_files_than_can_be_read_the_oldest_count(pipelines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ages: list[int] = []
    for name in ("tickets", "aa", "bb"):
        # Again, until the file system's clock, which moves by some milliseconds at a time, shows it to be newer.
        while (age := write(pipelines, f"{name}.yaml", name).stat().st_ctime_ns) in ages:
            time.sleep(0.001)
        ages.append(age)
    # As if reading a file took four seconds.
    clock = itertools.count(0, 4)
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    dags = load().DAGS
    monkeypatch.undo()
    assert [name for name, dag in dags.items() if "broken" not in dag.tags] == ["tickets"]
    (new,) = set(dags) - {"tickets"}
    assert "aa.yaml and 1 newer files: not read" in (dags[new].doc_md or "")


def test_parsing_takes_less_than_a_second_beyond_the_imports(pipelines: Path) -> None:
    import airflow.sdk  # noqa: F401

    for i in range(5):
        write(pipelines, f"line-{i}.yaml", f"line-{i}")
    seconds = []
    for _ in range(3):
        started = time.process_time()
        assert len(load().DAGS) == 5
        seconds.append(time.process_time() - started)
    # Python may look through all objects of this process in one of them, which takes a second by itself.
    assert min(seconds) < 1.0
