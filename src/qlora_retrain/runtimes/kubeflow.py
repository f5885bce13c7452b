"""Kubeflow's form of the graph: one container component a step, made from the same `Step` as Airflow's tasks.

`plan_task` is task 0: it makes the run's plan, or checks another run's, and hands its URI on as its one output.
`step_task` runs `python -m components.<step> --plan URI`. Data never passes through KFP: steps meet in the store, so
KFP's cache is off (the store's keys are ours) and a retry finds whatever was made.

Refuses (12) an image without a tag or digest, or one called `latest`: the plan and every step must be the same code.

Command: `.venv-kfp/bin/qlora-retrain kfp compile`
"""

# No `from __future__ import annotations`: kfp reads a component's annotations as objects.

import runpy
from collections.abc import Mapping
from pathlib import Path

from kfp import compiler, dsl

from qlora_retrain import code
from qlora_retrain import images as images_by_name
from qlora_retrain.errors import UsageError
from qlora_retrain.graph import PLAN_TASK, Image, Step

Images = Mapping[Image, str]

GPU = "nvidia.com/gpu"
PLAN_RETRIES = 2  # as in Airflow: a plan reads sources and the store, which may throttle


def plan_task(images: Images, *, config: str, root: str, plan_uri: str, overrides: list[str]) -> dsl.PipelineTask:
    """Task 0; its output `uri` is where the run's plan is. The arguments are the pipeline's own parameters."""

    def plan(
        config: str,
        root: str,
        plan_uri: str,
        overrides: list[str],
        run: str,
        uri: dsl.OutputPath(str),  # type: ignore[valid-type]
    ) -> dsl.ContainerSpec:
        command = ["python", "-m", "qlora_retrain.cli", "plan", config, "--root", root, "--orchestrator-id", run]
        command += ["--plan", plan_uri, "--set-json", overrides, "--uri-to", uri]  # type: ignore[list-item]
        return dsl.ContainerSpec(image=images["light"], command=command)

    # The run's id must be a task's argument: that is where KFP resolves it, not inside a command.
    task = dsl.container_component(plan)(
        config=config, root=root, plan_uri=plan_uri, overrides=overrides, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER
    )
    return _settled(task, PLAN_TASK, images["light"], PLAN_RETRIES)


def step_task(step: Step, images: Images, plan: dsl.PipelineTask) -> dsl.PipelineTask:
    """One step; the plan's output makes it run after task 0."""
    image = images[step.image]

    def run(plan_uri: str) -> dsl.ContainerSpec:
        command = ["python", "-m", f"components.{step.name}", "--plan", plan_uri]
        return dsl.ContainerSpec(image=image, command=command)

    run.__name__ = step.name  # kfp names a component after its function
    task = _settled(dsl.container_component(run)(plan_uri=plan.outputs["uri"]), step.name, image, step.retries)
    if step.gpus:
        task.set_accelerator_type(GPU).set_accelerator_limit(step.gpus)
    return task


def compile_to(out: Path, images: Images = images_by_name.DEFAULT) -> None:
    """Write the pipeline of `dags/retrain_kfp.py` as the YAML that KFP takes.

    Raises:
        UsageError: For an image that is not pinned, or a checkout without that file.
    """
    for ref in images.values():
        images_by_name.pinned(ref)
    file = code.project_root() / "dags" / "retrain_kfp.py"
    if not file.is_file():
        raise UsageError(f"{file}: not found; compile from a checkout")
    pipeline = runpy.run_path(str(file))["pipeline"](images)
    out.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline, package_path=str(out))


def _settled(task: dsl.PipelineTask, name: str, image: str, retries: int) -> dsl.PipelineTask:
    """What every task has: the graph's name in the UI, no KFP cache, retries, its image for the manifest."""
    task.set_display_name(name)
    task.set_caching_options(enable_caching=False)
    task.set_env_variable("QLORA_RETRAIN_IMAGE", image)
    task.set_retry(retries, backoff_duration="5s", backoff_factor=2.0, backoff_max_duration="300s")
    return task
