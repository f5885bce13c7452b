"""One Airflow DAG for every YAML in pipelines/: the plan, then the steps of the graph.

Reads each line's schedule, description and knobs. A file that cannot be used becomes a DAG whose one task fails with
the file's errors, so that the other lines keep running and whoever is on call sees what is wrong.

Environment: `QLORA_RETRAIN_PIPELINES`, another folder of YAML files. To see a file's errors: `qlora-retrain check FILE`
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml
from airflow.sdk import DAG, BaseOperator, CronTriggerTimetable, Param
from croniter import croniter  # type: ignore[import-untyped]

from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import PLAN_TASK, STEPS, Step, after
from qlora_retrain.runtimes.airflow import params
from qlora_retrain.runtimes.airflow.local import LocalStepOperator
from qlora_retrain.runtimes.airflow.operators import BrokenLineOperator, PlanOperator

PROJECT = Path(__file__).resolve().parents[1]
PIPELINES = Path(os.environ.get("QLORA_RETRAIN_PIPELINES") or PROJECT / "pipelines")


def line_dag(path: Path) -> DAG:
    """The DAG of one line."""
    config = load(path)
    dag = DAG(
        config.line,
        description=config.description,
        doc_md=f"{config.description}\n\nFrom `{path.name}`: `plan`, then the steps that its keys say are not made.",
        schedule=timetable(config.schedule),
        params={name: Param(value, **schema) for name, (value, schema) in params.fields(config).items()},
        max_active_runs=1,
        catchup=False,
        tags=["qlora-retrain"],
    )
    tasks = {PLAN_TASK: PlanOperator(task_id=PLAN_TASK, config_path=path, doc_md=plan_page(path, config), dag=dag)}
    for step in STEPS:
        tasks[step.name] = step_task(step, config, dag)
    for step in STEPS:
        tasks[step.name].set_upstream([tasks[name] for name in after(step) or (PLAN_TASK,)])
    return dag


def step_task(step: Step, config: LineConfig, dag: DAG) -> BaseOperator:
    """A step as a task of the line's runtime, whose engine's provider is imported only where a line uses it."""
    common = {"task_id": step.name, "step": step.name, "line": config.line, "doc_md": page(step), "dag": dag}
    if config.runtime.kind == "docker":
        from qlora_retrain.runtimes.airflow.docker import DockerStepOperator

        return DockerStepOperator(runtime=config.runtime, **common)
    if config.runtime.kind == "kubernetes":
        from qlora_retrain.config import profile
        from qlora_retrain.runtimes.airflow.kubernetes import KubernetesStepOperator

        cluster = profile.of_environment()
        pool = {"pool": cluster.gpu_pool, "pool_slots": cluster.gpus(step)} if cluster.gpu_pool else {}
        return KubernetesStepOperator(
            runtime=config.runtime, profile=cluster, **common, **(pool if cluster.gpus(step) else {})
        )
    return LocalStepOperator(**common)


def broken_dag(path: Path, why: str) -> DAG:
    """The DAG that stands in for a line whose file cannot be used; on the file's schedule, if that much can be read."""
    name, schedule = path.stem, None
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        name = document["line"] if re.fullmatch(r"[a-z][a-z0-9-]{1,62}", document["line"]) else name
        schedule = timetable(document.get("schedule"))
    except Exception:  # noqa: BLE001, S110 - whatever is wrong with the file is in `why` already
        pass
    name = re.sub(r"[^\w.-]", "-", name if name not in DAGS else f"{name}.{path.stem}")
    dag = DAG(name, doc_md=f"```\n{why}\n```", schedule=schedule, catchup=False, tags=["qlora-retrain", "broken"])
    BrokenLineOperator(task_id=PLAN_TASK, why=why, dag=dag)
    return dag


def timetable(cron: str | None) -> CronTriggerTimetable | None:
    """A cron expression in UTC, or only when triggered."""
    if cron and not croniter.is_valid(cron):  # Airflow would find out later, and drop the whole file's DAGs
        raise UsageError(f"schedule: {cron!r} is not a cron expression; wanted e.g. '0 3 * * 1'")
    return CronTriggerTimetable(cron, timezone="UTC") if cron else None


def page(step: Step) -> str:
    """What the UI tells about a step: its contract."""
    readme = PROJECT / "components" / step.name / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else step.summary


def plan_page(path: Path, config: LineConfig) -> str:
    """What the UI tells about task 0."""
    return f"Resolves `{path.name}` and the sources of `{config.line}` into `runs/<run_id>/plan.json`."


DAGS: dict[str, DAG] = {}
for file in sorted(p for p in PIPELINES.glob("*") if p.suffix in (".yaml", ".yml")):
    try:
        found = line_dag(file)
        if found.dag_id in DAGS:
            raise UsageError(f"{file}: line {found.dag_id} is in another file already; a line is one file")
    except Exception as error:  # noqa: BLE001 - one bad file must not take the other lines down
        found = broken_dag(file, f"{error}")
    DAGS[found.dag_id] = found
globals().update(DAGS)
