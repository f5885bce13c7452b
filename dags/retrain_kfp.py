"""The Kubeflow pipeline: the plan, then the steps of the graph; `retrain.py` beside it is the same for Airflow.

Reads the images to run (`light`, `train`); makes the pipeline `retrain`. One pipeline serves every line: which one, and
which store, are parameters of a run.

Command: `.venv-kfp/bin/qlora-retrain kfp compile`
"""

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from qlora_retrain.graph import STEPS, after
from qlora_retrain.runtimes.kubeflow import Images, plan_task, step_task


def pipeline(images: Images) -> BaseComponent:
    """The pipeline, its containers made from these images."""

    @dsl.pipeline(name="retrain")
    def retrain(config: str, root: str, plan_uri: str = "", overrides: list[str] = []):  # noqa: B006 - kfp's default
        """Retrain a line, judge by measurement, publish.

        Args:
            config: The line's YAML inside the image, e.g. pipelines/support-intents.yaml.
            root: The store, s3://bucket/prefix.
            plan_uri: Finish the plan of another run; empty: make one.
            overrides: Settings changed for this run, e.g. ["train.learning_rate=1e-4"].
        """
        plan = plan_task(images, config=config, root=root, plan_uri=plan_uri, overrides=overrides)
        tasks = {}
        for step in STEPS:
            tasks[step.name] = step_task(step, images, plan).after(*(tasks[name] for name in after(step)))

    return retrain
