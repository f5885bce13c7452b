"""Build an Airflow DAG `LINE-lab` for every line that platform.yaml names in `labs`: train it with several settings.

The plan writes one plan for each point. Data are made once, and a base once for all points that have it; then tasks are
mapped over the points. A point that fails stops no other. The last task writes `lab.json` and `report.html` to the
run's folder in the store. Nothing is published, and no alias moves.

Without Airflow: `qlora-retrain lab FILE --vary train.rank=4,16`
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, BaseXCom, Param, get_current_context, task, task_group
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from qlora_retrain.config import platform
from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core import graph
from qlora_retrain.core.errors import Problem
from qlora_retrain.runtimes.airflow import schedules
from qlora_retrain.runtimes.airflow.step_tasks import step_operator

PIPELINES = Path(os.environ.get("QLORA_RETRAIN_PIPELINES") or Path(__file__).resolve().parents[1] / "pipelines")
DATA, BASES, LAB = "data", "bases", "lab"  # under these keys the plan leaves more than the plans of the points
OF_EACH_POINT = ("adapter", "evaluation", "model")
FORM = {
    "vary": Param(
        ["train.rank=8,16"],
        type="array",
        items={"type": "string", "maxLength": 500},
        title="vary",
        description="one setting a line, SECTION.KNOB=VALUE,VALUE; several are multiplied",
    ),
    "seeds": Param(1, type="integer", minimum=1, maximum=20, description="train each point with so many seeds"),
    "judge_fraction": Param(
        0.1, type="number", exclusiveMinimum=0.0, maximum=0.5,
        description="the share of the training prompts that is not trained on, and on which the points are judged",
    ),
    "skip_impossible": Param(False, type="boolean", description="leave out combinations that the line refuses"),
    "merge": Param(False, type="boolean", description="merge every adapter too, and measure what merging costs"),
}  # fmt: skip


def lab_dag(path: Path) -> DAG:
    """Make the DAG of one line."""
    from qlora_retrain.lab.plans import lab_line

    config = load(path)
    name = lab_line(config.line)
    with DAG(
        name,
        dag_display_name=f"Lab of {config.line}",
        description=f"Compares settings of {config.line} on a share of its training rows; publishes nothing.",
        doc_md=__doc__,
        schedule=None,
        params=FORM,
        dagrun_timeout=timedelta(days=30),
        catchup=False,
        default_args=schedules.task_defaults(config.line),
        tags=["qlora-retrain", "lab"],
    ) as dag:
        plans = plan_points(str(path))
        data = step_task(step_of("dataset"), config, name, DATA)
        listed = list_bases()
        bases = base_group(config, name).expand(number=listed)
        points = point_group(config, name).expand(number=plans)
        plans >> data >> points
        plans >> listed >> bases >> points
        points >> report(str(path))
    return dag


def base_group(config: LineConfig, name: str) -> Any:
    """Return the group of the step that stores a base in its format."""

    @task_group(group_id="bases")
    def group(number: str) -> None:
        step_task(step_of("base_nf4"), config, name, BASES)

    return group


def point_group(config: LineConfig, name: str) -> Any:
    """Return the group of the steps of a point; one that is not asked for ends at once."""

    @task_group(group_id="points")
    def group(number: str) -> None:
        previous = None
        for artifact in OF_EACH_POINT:
            current = step_task(step_of(artifact), config, name, BaseXCom.XCOM_RETURN_KEY)
            if previous is not None:
                current.set_upstream(previous)
            previous = current

    return group


def step_task(step: graph.Step, config: LineConfig, name: str, plans_key: str) -> Any:
    """Make the task of a step, in the runtime that the platform has for this lab."""
    operator, arguments = step_operator(step, config, name)
    return operator(**arguments, plans_key=plans_key, doc_md=step.summary, pre_execute=skip_unless_wanted)


def skip_unless_wanted(context: Any) -> None:
    """Skip the merge where the form does not ask for it."""
    if context["ti"].task.step == step_of("model").name and not context["params"]["merge"]:
        raise AirflowSkipException("the form did not ask for merging")


def step_of(artifact: str) -> graph.Step:
    """Return the step that makes an artifact."""
    return graph.step(graph.producer_name(artifact))


def options_of(config_path: str) -> Any:
    """Return what this DAG run's form asks for."""
    from qlora_retrain.lab.options import LabOptions
    from qlora_retrain.lab.variations import parse_variation
    from qlora_retrain.runtimes.airflow.dag_run import store_root

    form = get_current_context()["params"]
    return LabOptions(
        config=Path(config_path),
        root=store_root(),
        vary=tuple(map(parse_variation, form["vary"])),
        num_seeds=form["seeds"],
        skip_impossible=form["skip_impossible"],
        judge_fraction=form["judge_fraction"],
        has_merge=form["merge"],
    )


@task(task_id=graph.PLAN_TASK, retries=2, execution_timeout=timedelta(hours=1))
def plan_points(config_path: str) -> list[str]:
    """Check every point and write its plan; return the plans of the points, and leave those of what they share."""
    from qlora_retrain.lab import experiment

    try:
        options = options_of(config_path)
        planned = experiment.plan_points(options)
    except Problem as problem:
        raise AirflowFailException(str(problem)) from None
    for point, plan in planned.points:
        print(f"{point.run_label}: run {plan.run_id}")
    for label, reason in planned.skipped:
        print(f"left out: {label}: {reason}")
    task_instance = get_current_context()["ti"]
    task_instance.xcom_push(key=LAB, value=planned.as_json())
    for key, artifact in ((DATA, "dataset"), (BASES, "base_nf4")):
        plans = planned.distinct_plans(graph.producer_name(artifact))
        task_instance.xcom_push(key=key, value=[plan.uri for plan in plans])
    return [plan.uri for plan in planned.distinct_plans(options.last_step)]


@task(execution_timeout=timedelta(minutes=10))
def list_bases() -> list[str]:
    """Return the plans of the bases, since Airflow maps over nothing but what a task returns."""
    plans: list[str] = get_current_context()["ti"].xcom_pull(task_ids=graph.PLAN_TASK, key=BASES)
    return plans


@task(trigger_rule="all_done", retries=2, execution_timeout=timedelta(hours=1))
def report(config_path: str) -> str:
    """Write the report of what was measured to the run's folder in the store, and return the recommendation."""
    import tempfile

    from qlora_retrain.lab import experiment, runs
    from qlora_retrain.lab.planned import NothingMeasured, PlannedLab
    from qlora_retrain.runtimes.airflow.dag_run import own_run_id
    from qlora_retrain.storage import open_store

    options, context = options_of(config_path), get_current_context()
    document = context["ti"].xcom_pull(task_ids=graph.PLAN_TASK, key=LAB)
    if document is None:
        raise AirflowFailException(f"task {graph.PLAN_TASK} has left no plans; its log says why")
    folder = f"runs/{own_run_id(context)}"
    try:
        planned = PlannedLab.from_json(document)
        jobs = experiment.jobs_of(planned, options.last_step)
        outcomes = {job.key: runs.outcome_of(job) for job in jobs}
        with tempfile.TemporaryDirectory(prefix="qlora-retrain-lab-") as temporary:
            measured = experiment.report_on(options, planned, outcomes, Path(temporary))
            open_store(options.root).upload(Path(temporary), folder, ["lab.json", "report.html"])
    except (Problem, NothingMeasured) as problem:
        raise AirflowFailException(str(problem)) from None
    for entry in measured["failed"]:
        print(f"{entry['label']}: {entry['message']}")
    print(f"report: {options.root}/{folder}/report.html")
    return str(measured["recommendation"]["sentence"])


for line in platform.load().labs:
    # A line that cannot be used fails as the DAG of its file, which says why.
    try:
        dag = lab_dag(PIPELINES / f"{line}.yaml")
    except Problem:
        continue
    globals()[f"dag {dag.dag_id}"] = dag
