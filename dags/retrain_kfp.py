"""The Kubeflow pipeline: the plan, then the steps of the graph; `retrain.py` beside it does the same for Airflow.

Reads a cluster's profile (images, nodes, secrets); makes the pipeline `retrain`. One pipeline serves every line: the
line and the store are parameters of a run. Every step compares its plan with them, and the one that publishes also with
the alias that the run may move.

Command: `.venv-kfp/bin/qlora-retrain kfp compile | submit | schedule | run`
"""

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.core.graph import STEPS, upstream_steps
from qlora_retrain.runtimes.kubeflow.tasks import plan_task, step_task, summary_task


def pipeline(profile: ClusterProfile) -> BaseComponent:
    """Make the pipeline for a cluster of this profile."""

    @dsl.pipeline(name="retrain")
    def retrain(
        line: dict,
        line_name: str,
        root: str,
        alias: str = "",
        resume_run: str = "",
        overrides: list = [],  # noqa: B006 - kfp's default
        started_by: str = "hand",
    ):
        """Retrain a line, evaluate it, publish it if it passes.

        Args:
            line: The line's document, with absolute sources.
            line_name: The line's name; a step refuses a plan of another line.
            root: The store, s3://bucket/prefix.
            alias: The one alias that may move: the line's publish.promote_to; empty: none.
            resume_run: Another run of this store to finish, by its id; empty: make a new one.
            overrides: Settings changed for this run, e.g. ["train.learning_rate=1e-4"].
            started_by: hand or schedule; only a run of the schedule needs the line's schedule.min_new_rows.
        """
        # The exit handler runs after all tasks inside it, also where one of them failed.
        with dsl.ExitHandler(summary_task(profile, line=line, root=root, resume_run=resume_run), name="steps"):
            plan = plan_task(
                profile, line=line, root=root, resume_run=resume_run, overrides=overrides, started_by=started_by
            )
            tasks = {}
            for step in STEPS:
                task = step_task(step, profile, plan, line_name=line_name, root=root, alias=alias)
                tasks[step.name] = task.after(*(tasks[name] for name in upstream_steps(step)))

    return retrain
