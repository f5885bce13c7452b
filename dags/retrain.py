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
from qlora_retrain.config.line import load
from qlora_retrain.core import visible_text
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import PLAN_TASK, PLAN_TITLE, STEPS, upstream_steps
from qlora_retrain.runtimes import deadlines
from qlora_retrain.runtimes.airflow import dag_ids, mirrors, notifications, params, schedules, task_docs
from qlora_retrain.runtimes.airflow.move_request import APPROVAL_DAG
from qlora_retrain.runtimes.airflow.operators import BrokenLineOperator, PlanOperator
from qlora_retrain.runtimes.airflow.request_approval import RequestApprovalOperator
from qlora_retrain.runtimes.airflow.step_tasks import step_operator

PROJECT = Path(__file__).resolve().parents[1]
REQUEST_DOC = f"Starts `{APPROVAL_DAG}`, which asks whether the version in `staging` may become `production`."
# Airflow gives up on this file, and so on every line, after 50 seconds. It needs four times as long for what it gets.
READING_CPU_SECONDS = 6.0
PIPELINES = Path(os.environ.get("QLORA_RETRAIN_PIPELINES") or PROJECT / "pipelines")
# The ids of DAGs that are no line's own.
RESERVED_IDS = dag_ids.reserved()


def line_dag(path: Path) -> DAG:
    """Make the DAG of one line.

    Raises:
        UsageError: If the file cannot be used, or is not the file of its line.
    """
    config = load(path)
    # Otherwise a new file could take over the DAG of a line that exists.
    if path.name != f"{config.line}.yaml":
        raise UsageError(f"{path}: is of line {config.line}, whose file is {config.line}.yaml; rename one of them")
    if config.line in RESERVED_IDS:
        raise UsageError(f"{path}: line {config.line}: Airflow has another DAG of that name; give the line another one")
    dag = DAG(
        config.line,
        # With the line's own name, so that no line can look like another one.
        dag_display_name=f"Retrain {config.line}",
        description=config.description,
        doc_md=task_docs.line_doc(config, path.name),
        schedule=schedules.dag_schedule(config),
        params={name: Param(value, **schema) for name, (value, schema) in params.form_fields(config).items()},
        # Two runs of a line at once would compare with the same champion, and then both try to replace it.
        max_active_runs=1,
        dagrun_timeout=deadlines.run_timeout(config),
        catchup=False,
        default_args=schedules.task_defaults(config.line),
        tags=["qlora-retrain"],
        **notifications.dag_arguments(config.line, deadlines.run_timeout(config)),
    )

    plan = PlanOperator(
        task_id=PLAN_TASK,
        config_path=path,
        execution_timeout=deadlines.line_timeout(config, PLAN_TASK),
        task_display_name=PLAN_TITLE,
        doc_md=task_docs.plan_doc(config, path.name),
        dag=dag,
    )
    tasks: dict[str, BaseOperator] = {PLAN_TASK: plan}
    for step in STEPS:
        operator, arguments = step_operator(step, config)
        task = operator(**arguments, dag=dag)
        # Each runtime has retries of its own.
        task.doc_md = task_docs.step_doc(step, task.retries, task.execution_timeout)
        tasks[step.name] = task
    # The steps that read only sources have no upstream step; they wait for the plan.
    for step in STEPS:
        tasks[step.name].set_upstream([tasks[name] for name in upstream_steps(step) or (PLAN_TASK,)])
    notifications.add_tasks(dag, config.line, last=tasks[STEPS[-1].name])
    mirrors.add_tasks(dag, config, last=tasks[STEPS[-1].name])
    if config.publish.approval:
        RequestApprovalOperator(line=config.line, doc_md=REQUEST_DOC, dag=dag).set_upstream(tasks[STEPS[-1].name])
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
    plan = BrokenLineOperator(task_id=PLAN_TASK, reason=reason, dag=dag)
    # Where platform.yaml cannot be used, which is the reason then, nobody is named in it.
    with contextlib.suppress(UsageError):
        notifications.add_tasks(dag, dag_id, last=plan)
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
    return next(dag_id for dag_id in candidates if dag_id not in {*DAGS, *RESERVED_IDS})


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
