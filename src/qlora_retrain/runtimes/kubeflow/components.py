"""Kubeflow's form of the graph: one container component a step, made from the same `Step` as Airflow's tasks.

`plan_task` is task 0: it makes the run's plan, or checks another run's, and hands its URI on. `step_task` runs
`python -m components.<step> --plan URI`. `summary_task` is the exit handler: however the run ended, it shows where it
stands, from the store. Data never passes through KFP: steps meet in the store, so KFP's cache is off (the store's keys
are ours) and a retry finds whatever was made. Reports and numbers are copied to KFP for its UI alone.

Refuses (12) an image without a tag or digest, or one called `latest`: the plan and every step must be the same code.

Command: `.venv-kfp/bin/qlora-retrain kfp compile`
"""

# No `from __future__ import annotations`: kfp reads a component's annotations as objects.

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import compiler, dsl, kubernetes
from kfp.dsl.base_component import BaseComponent

from qlora_retrain.config.profile import Pod, Profile
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import PLAN_TASK, Step
from qlora_retrain.pipeline import code_identity
from qlora_retrain.runtimes.docker import container_spec

SUMMARY_TASK = "summary"
PLAN_RETRIES = 2  # as in Airflow: a plan reads sources and the store, which may throttle
USER = 10001  # the images' own
CLI = ["python", "-m", "qlora_retrain.cli"]
# KFP fills in a run's id where it is a task's argument, not inside a command.
RUN = dsl.PIPELINE_JOB_ID_PLACEHOLDER


def plan_task(profile: Profile, *, line: dict[str, Any], root: str, plan_uri: str, overrides: list[str]) -> Any:
    """Task 0; its output `uri` is where the run's plan is. The arguments are the pipeline's own parameters."""

    def plan(
        line: dict,  # type: ignore[type-arg]
        root: str,
        plan_uri: str,
        overrides: list,  # type: ignore[type-arg]
        run: str,
        uri: dsl.OutputPath(str),  # type: ignore[valid-type]
        report: dsl.Output[dsl.Markdown],
    ) -> dsl.ContainerSpec:
        command: list[Any] = [*CLI, "plan", "--document", line, "--root", root, "--orchestrator-id", run]
        command += ["--plan", plan_uri, "--set-json", overrides, "--report-to", report.path, "--uri-to", uri]
        return dsl.ContainerSpec(image=profile.light_image, command=command)

    task = _component(plan)(line=line, root=root, plan_uri=plan_uri, overrides=overrides, run=RUN)
    return _settled(task, PLAN_TASK, profile.light_image, PLAN_RETRIES, profile, profile.light)


def step_task(step: Step, profile: Profile, plan: Any) -> Any:
    """One step; the plan's output makes it run after task 0."""
    image = profile.image(step.image)

    def with_report(plan_uri: str, report: dsl.Output[dsl.HTML], numbers: dsl.Output[dsl.Metrics]) -> dsl.ContainerSpec:
        return dsl.ContainerSpec(image=image, command=[*command(plan_uri), "--report-to", report.path])

    def with_numbers(plan_uri: str, numbers: dsl.Output[dsl.Metrics]) -> dsl.ContainerSpec:
        return dsl.ContainerSpec(image=image, command=command(plan_uri))

    def command(plan_uri: str) -> list[str]:
        return [
            *container_spec.command(step.name, plan_uri),
            "--executor-input",
            dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER,
        ]

    run = with_report if step.report else with_numbers
    run.__name__ = step.name  # kfp names a component after its function
    task = _component(run)(plan_uri=plan.outputs["uri"])
    _settled(task, step.name, image, step.retries, profile, profile.pod(step))
    if profile.gpus(step):
        task.set_accelerator_type(profile.gpu_resource).set_accelerator_limit(profile.gpus(step))
    if profile.gpus(step) > 1:
        size = f"{container_spec.SHARED_MEMORY_BYTES // 2**20}Mi"
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=size)  # noqa: S108
    return task


def summary_task(profile: Profile, *, line: dict[str, Any], root: str, plan_uri: str) -> Any:
    """The exit handler: the run on a page, and the report that says why it ended as it did.

    KFP drops what a failed container wrote, so a refusal's report can be seen only here.
    """

    def summary(
        line: dict,  # type: ignore[type-arg]
        root: str,
        plan_uri: str,
        run: str,
        status: dsl.PipelineTaskFinalStatus,  # what makes it an exit handler; the store's word counts, not KFP's
        page: dsl.Output[dsl.HTML],
        report: dsl.Output[dsl.HTML],
    ) -> dsl.ContainerSpec:
        command: list[Any] = [*CLI, "status", "--document", line, "--root", root, "--orchestrator-id", run]
        command += ["--plan", plan_uri, "--page", page.path, "--report-to", report.path]
        return dsl.ContainerSpec(image=profile.light_image, command=command)

    task = _component(summary)(line=line, root=root, plan_uri=plan_uri, run=RUN)
    return _settled(task, SUMMARY_TASK, profile.light_image, PLAN_RETRIES, profile, profile.light)


def pipeline(profile: Profile) -> BaseComponent:
    """The pipeline of `dags/retrain_kfp.py`.

    Raises:
        UsageError: Where that file is not.
    """
    file = code_identity.project_root() / "dags" / "retrain_kfp.py"
    if not file.is_file():
        raise UsageError(f"{file}: not found; compile from a checkout")
    made: BaseComponent = runpy.run_path(str(file))["pipeline"](profile)
    return made


def compile_to(out: Path, profile: Profile) -> None:
    """Write the pipeline as the YAML that KFP takes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline(profile), package_path=str(out))


def _component(function: Callable[..., dsl.ContainerSpec]) -> Callable[..., Any]:
    made: Callable[..., Any] = dsl.container_component(function)
    return made


def _settled(task: Any, name: str, image: str, retries: int, profile: Profile, pod: Pod) -> Any:
    """What every task has: the graph's name in the UI, no KFP cache, retries, and what the profile says of its pod."""
    task.set_display_name(name)
    task.set_caching_options(enable_caching=False)
    task.set_retry(retries, backoff_duration="5s", backoff_factor=2.0, backoff_max_duration="300s")
    if pod.cpus:
        task.set_cpu_request(f"{pod.cpus:g}")
    if pod.memory_gib:
        task.set_memory_request(f"{pod.memory_gib:g}Gi").set_memory_limit(f"{pod.memory_gib:g}Gi")
    variables = {**profile.env, "QLORA_RETRAIN_IMAGE": image, "QLORA_RETRAIN_CACHE": f"{container_spec.WORK}/cache"}
    for variable, value in variables.items():
        task.set_env_variable(variable, value)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    # Not a claim of its own: a new disk belongs to root, and KFP cannot say otherwise.
    kubernetes.empty_dir_mount(task, "work", container_spec.WORK, size_limit=f"{profile.work_gib:g}Gi")
    for label, value in pod.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for taint in pod.tolerations:
        kubernetes.add_toleration(task, **taint.model_dump(exclude_none=True))
    for secret in profile.secrets:
        kubernetes.use_secret_as_volume(task, secret.name, secret.mount)
    if profile.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(profile.image_pull_secrets))
    return task
