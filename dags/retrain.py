"""Build one Airflow DAG for every YAML in pipelines/: the plan, then the steps of the graph.

A line's file is `<line>.yaml`; no other file can define that line.

Reads each line's schedule, description and knobs. A file that cannot be used becomes a DAG whose only task fails with
the file's errors. So the other lines keep running, and the person on call sees what is wrong.

Where the steps run is no line's to say: `platform.yaml` does, see `qlora_retrain.config.platform`.

Environment: `QLORA_RETRAIN_PIPELINES`, another folder of YAML files; `QLORA_RETRAIN_PLATFORM`, another platform.yaml.
To see a file's errors: `qlora-retrain check FILE`
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, BaseOperator, CronTriggerTimetable, Param

from qlora_retrain.config import bounded_yaml, schedule
from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core import visible_text
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import PLAN_TASK, STEPS, Step, upstream_steps
from qlora_retrain.runtimes import deadlines
from qlora_retrain.runtimes.airflow import params, schedules
from qlora_retrain.runtimes.airflow.operators import BrokenLineOperator, PlanOperator
from qlora_retrain.runtimes.airflow.step_tasks import step_operator

PROJECT = Path(__file__).resolve().parents[1]
# Airflow gives up on this file, and so on every line, after 50 seconds. It needs four times as long for what it gets.
READING_CPU_SECONDS = 6.0
PIPELINES = Path(os.environ.get("QLORA_RETRAIN_PIPELINES") or PROJECT / "pipelines")


def line_dag(path: Path) -> DAG:
    """Make the DAG of one line.

    Raises:
        UsageError: If the file cannot be used, or is not the file of its line.
    """
    config = load(path)
    # Otherwise a new file could take over the DAG of a line that exists.
    if path.name != f"{config.line}.yaml":
        raise UsageError(f"{path}: is of line {config.line}, whose file is {config.line}.yaml; rename one of them")
    dag = DAG(
        config.line,
        description=config.description,
        doc_md=f"{config.description}\n\n`{path.name}`: `plan`, then every step whose artifact does not exist yet.",
        schedule=schedules.dag_schedule(config),
        params={name: Param(value, **schema) for name, (value, schema) in params.form_fields(config).items()},
        # Two runs of a line at once would compare with the same champion, and then both try to replace it.
        max_active_runs=1,
        dagrun_timeout=deadlines.run_timeout(config),
        catchup=False,
        default_args=schedules.task_defaults(config.line),
        tags=["qlora-retrain"],
    )

    plan = PlanOperator(
        task_id=PLAN_TASK,
        config_path=path,
        execution_timeout=deadlines.line_timeout(config, PLAN_TASK),
        doc_md=plan_doc(path, config),
        dag=dag,
    )
    tasks: dict[str, BaseOperator] = {PLAN_TASK: plan}
    for step in STEPS:
        operator, arguments = step_operator(step, config)
        tasks[step.name] = operator(**arguments, doc_md=step_doc(step), dag=dag)
    # The steps that read only sources have no upstream step; they wait for the plan.
    for step in STEPS:
        tasks[step.name].set_upstream([tasks[name] for name in upstream_steps(step) or (PLAN_TASK,)])
    return dag


def broken_dag(dag_id: str, reason: str, schedule: CronTriggerTimetable | None) -> DAG:
    """Make the DAG that stands in for a file that cannot be used.

    It has the line's schedule where this can be read, so it fails when the line would have run.
    """
    dag = DAG(
        dag_id,
        doc_md=f"```\n{reason}\n```",
        schedule=schedule,
        catchup=False,
        dagrun_timeout=timedelta(hours=1),
        tags=["qlora-retrain", "broken"],
    )
    BrokenLineOperator(task_id=PLAN_TASK, reason=reason, dag=dag)
    return dag


def schedule_of(path: Path) -> CronTriggerTimetable | None:
    """Return the schedule in a file that cannot be used, if that much can be read."""
    # Whatever is wrong with the file is known already.
    with contextlib.suppress(Exception):
        document, _ = bounded_yaml.parse(bounded_yaml.read_text(path), path.name)
        section = schedule.ScheduleConfig.model_validate(schedule.expand_short_form(document.get("schedule")))
        # Without its data, which this file may name wrongly.
        return schedules.timetable(section)
    return None


def line_files() -> list[Path]:
    """List the files of lines, the oldest first: where there are too many to be read, the new ones are left out."""
    files = [path for path in PIPELINES.glob("*") if path.suffix in (".yaml", ".yml")]
    return sorted(files, key=lambda path: (path.lstat().st_ctime_ns, path.name))


def broken_id(path: Path) -> str:
    """Return an id for the DAG of a broken file that no other DAG has."""
    # Airflow refuses other characters in an id.
    name = re.sub(r"[^\w.-]", "-", path.stem)[:200]
    candidates = itertools.chain([name], (f"{name}.{path.suffix[1:]}.{i}" for i in itertools.count(1)))
    return next(dag_id for dag_id in candidates if dag_id not in DAGS)


def step_doc(step: Step) -> str:
    """Return the text that the UI shows about a step: the README of its component."""
    readme = PROJECT / "components" / step.name / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else step.summary


def plan_doc(path: Path, config: LineConfig) -> str:
    """Return the text that the UI shows about task 0."""
    return f"Reads `{path.name}`, pins the sources of `{config.line}`, and writes the plan `runs/<run_id>/plan.json`."


DAGS: dict[str, DAG] = {}
broken: list[tuple[Path, str, CronTriggerTimetable | None]] = []
started = time.process_time()
files = line_files()
for i, path in enumerate(files):
    if time.process_time() - started > READING_CPU_SECONDS:
        left_out = f"{path.name} and {len(files) - i - 1} newer files"
        broken.append((PIPELINES, f"{left_out}: not read, since it would take too long; remove some files", None))
        break
    try:
        dag = line_dag(path)
    except Exception as error:  # noqa: BLE001 - one bad file must not take the other lines down
        # Also of characters that no file of text has, as in a file name that is not UTF-8.
        broken.append((path, visible_text.escape_controls(str(error)), schedule_of(path)))
    else:
        DAGS[dag.dag_id] = dag
# Last, so that no broken file has the id of a line.
for path, reason, schedule_or_none in sorted(broken, key=lambda item: item[0]):
    dag = broken_dag(broken_id(path), reason, schedule_or_none)
    DAGS[dag.dag_id] = dag
# Airflow collects the DAGs that are global variables of this module. A file's name alone could be that of another
# variable: with `__file__.yaml` Airflow could read no line.
globals().update({f"dag {dag_id}": dag for dag_id, dag in DAGS.items()})
