"""The Kubeflow pipeline: the plan, then the steps of the graph; `retrain.py` beside it is the same for Airflow.

Reads a cluster's profile (images, nodes, secrets); makes the pipeline `retrain`. One pipeline serves every line: which
one, and which store, are parameters of a run.

Command: `.venv-kfp/bin/qlora-retrain kfp compile | submit | schedule | run`
"""

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from qlora_retrain.config.profile import Profile
from qlora_retrain.core.graph import STEPS, after
from qlora_retrain.runtimes.kubeflow.components import plan_task, step_task, summary_task


def pipeline(profile: Profile) -> BaseComponent:
    """The pipeline on a cluster of this profile."""

    @dsl.pipeline(name="retrain")
    def retrain(line: dict, root: str, plan_uri: str = "", overrides: list = []):  # noqa: B006 - kfp's default
        """Retrain a line, judge by measurement, publish.

        Args:
            line: The line's document, its sources absolute.
            root: The store, s3://bucket/prefix.
            plan_uri: Finish the plan of another run; empty: make one.
            overrides: Settings changed for this run, e.g. ["train.learning_rate=1e-4"].
        """
        with dsl.ExitHandler(summary_task(profile, line=line, root=root, plan_uri=plan_uri), name="steps"):
            plan = plan_task(profile, line=line, root=root, plan_uri=plan_uri, overrides=overrides)
            tasks = {}
            for step in STEPS:
                tasks[step.name] = step_task(step, profile, plan).after(*(tasks[name] for name in after(step)))

    return retrain
