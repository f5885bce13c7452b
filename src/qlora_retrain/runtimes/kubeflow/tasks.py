"""The tasks of the Kubeflow pipeline: one container component per step, made from the same `Step` as Airflow's tasks.

`plan_task` is task 0: it makes the run's plan, or checks another run's, and passes its URI on. `step_task` runs
`python -m components.<step> --plan URI` with the line, the store and the alias of the run's parameters, so that a step
refuses any other plan. `summary_task` is the exit handler: however the run ended, it shows the state of every step,
read from the store.

Data never passes through KFP, because steps exchange artifacts through the store. So KFP's cache is off: the store's
keys do that work, and a retry finds whatever is complete. Reports and numbers are copied to KFP only for its UI.

Refuses (12) an image without a tag or digest, or with the tag `latest`: the plan and every step must be the same code.

Command: `.venv-kfp/bin/qlora-retrain kfp compile`
"""

# No `from __future__ import annotations`: kfp reads a component's annotations as objects.

import inspect
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import compiler, dsl, kubernetes
from kfp.dsl.base_component import BaseComponent

from qlora_retrain.config.cluster_profile import DEFAULT_DISK_GIB, ClusterProfile, PodConfig, quantity
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import PLAN_TASK, STEPS, Step
from qlora_retrain.pipeline import code_identity
from qlora_retrain.runtimes import credentials, deadlines
from qlora_retrain.runtimes.docker import container_spec
from qlora_retrain.storage.keys import KEYS_VARIABLE, PLANNER

SUMMARY_TASK = "summary"
PLAN_RETRIES = 2  # as in Airflow: a plan reads sources and the store, which may be throttled
USER_ID = 10001  # the images' own user
# With `auto`, of the tasks that have no plan yet, or no step: they read files, and hold neither rows nor a model.
LIGHT_TASK_GIB = 2.0
CLI_COMMAND = ["python", "-m", "qlora_retrain.cli"]
# KFP replaces this placeholder only where it is a task's argument, not inside a command.
RUN_ID_PLACEHOLDER = dsl.PIPELINE_JOB_ID_PLACEHOLDER


def plan_task(
    profile: ClusterProfile, *, line: dict[str, Any], root: str, resume_run: str, overrides: list[str], started_by: str
) -> Any:
    """Make task 0; the keyword arguments are the pipeline's parameters.

    Its output `uri` is the plan's URI. For each step whose memory is `auto` it has an output with the memory of the
    step's pod, which KFP fills in when it creates the pod.
    """
    sized_steps = [step for step in STEPS if profile.pod(step).memory_gib == "auto"]

    def plan(
        line: dict,  # type: ignore[type-arg]
        root: str,
        resume_run: str,
        overrides: list,  # type: ignore[type-arg]
        started_by: str,
        run: str,
        uri: dsl.OutputPath(str),  # type: ignore[valid-type]
        report: dsl.Output[dsl.Markdown],
        *memory_files: dsl.OutputPath(str),  # type: ignore[valid-type]
    ) -> dsl.ContainerSpec:
        command: list[Any] = [*CLI_COMMAND, "plan", "--document", line, "--root", root, "--orchestrator-id", run]
        # KFP passes a list as JSON.
        command += ["--resume", resume_run, "--set-json", overrides, "--started-by", started_by]
        command += ["--report-to", report.path, "--uri-to", uri]
        for step, file in zip(sized_steps, memory_files, strict=True):
            command += ["--memory-to", step.name, f"{profile.pod(step).max_memory_gib:g}", file]
        return dsl.ContainerSpec(image=profile.light_image, command=command)

    _name_outputs(plan, [_memory_output(step) for step in sized_steps])
    task = _container_component(plan)(
        line=line,
        root=root,
        resume_run=resume_run,
        overrides=overrides,
        started_by=started_by,
        run=RUN_ID_PLACEHOLDER,
    )
    memory = _memory_without_plan(profile.light)
    return _configure_task(task, PLAN_TASK, profile.light_image, PLAN_RETRIES, profile, profile.light, memory)


def step_task(step: Step, profile: ClusterProfile, plan: Any, *, line_name: str, root: str, alias: str) -> Any:
    """Make the task of one step; it takes the plan task's output, so it runs after task 0."""
    image = profile.image(step.image)

    # Two functions, because kfp derives a component's outputs from its signature, and not every step has a report. The
    # output parameter `ending` is the JSON document of `core.endings`, which other tools can read.
    def with_report(
        plan_uri: str,
        line_name: str,
        root: str,
        alias: str,
        report: dsl.Output[dsl.HTML],
        numbers: dsl.Output[dsl.Metrics],
        ending: dsl.OutputPath(str),  # type: ignore[valid-type]
    ) -> dsl.ContainerSpec:
        command = step_command(plan_uri, line_name, root, alias, ending)
        return dsl.ContainerSpec(image=image, command=[*command, "--report-to", report.path])

    def with_numbers(
        plan_uri: str,
        line_name: str,
        root: str,
        alias: str,
        numbers: dsl.Output[dsl.Metrics],
        ending: dsl.OutputPath(str),  # type: ignore[valid-type]
    ) -> dsl.ContainerSpec:
        return dsl.ContainerSpec(image=image, command=step_command(plan_uri, line_name, root, alias, ending))

    def step_command(plan_uri: str, line_name: str, root: str, alias: str, ending: Any) -> list[Any]:
        command: list[Any] = [*container_spec.step_command(step.name, plan_uri), "--line", line_name, "--root", root]
        command += ["--alias", alias, "--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER]
        return [*command, "--ending-to", ending]

    run = with_report if step.report else with_numbers
    run.__name__ = step.name  # kfp names a component after its function
    task = _container_component(run)(plan_uri=plan.outputs["uri"], line_name=line_name, root=root, alias=alias)
    pod = profile.pod(step)
    memory = plan.outputs[_memory_output(step)] if pod.memory_gib == "auto" else _memory_without_plan(pod)
    _configure_task(task, step.name, image, step.retries, profile, pod, memory)

    if profile.gpus(step):
        task.set_accelerator_type(profile.gpu_resource).set_accelerator_limit(profile.gpus(step))
    # NCCL exchanges data between the GPUs of a pod through shared memory, of which a pod has 64 MiB by default.
    if profile.gpus(step) > 1:
        size = f"{container_spec.SHARED_MEMORY_BYTES // 2**20}Mi"
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=size)  # noqa: S108
    return task


def summary_task(profile: ClusterProfile, *, line: dict[str, Any], root: str, resume_run: str) -> Any:
    """Make the exit handler: a page about the run, and the report that explains how it ended.

    KFP drops what a failed container wrote, so this task is the only place in its UI for a refusal's report.
    """

    def summary(
        line: dict,  # type: ignore[type-arg]
        root: str,
        resume_run: str,
        run: str,
        status: dsl.PipelineTaskFinalStatus,  # makes it an exit handler; not used, the store has the state
        page: dsl.Output[dsl.HTML],
        report: dsl.Output[dsl.HTML],
    ) -> dsl.ContainerSpec:
        command: list[Any] = [*CLI_COMMAND, "status", "--document", line, "--root", root, "--orchestrator-id", run]
        command += ["--resume", resume_run, "--page", page.path, "--report-to", report.path]
        return dsl.ContainerSpec(image=profile.light_image, command=command)

    task = _container_component(summary)(line=line, root=root, resume_run=resume_run, run=RUN_ID_PLACEHOLDER)
    memory = _memory_without_plan(profile.light)
    return _configure_task(task, SUMMARY_TASK, profile.light_image, PLAN_RETRIES, profile, profile.light, memory)


def load_pipeline(profile: ClusterProfile) -> BaseComponent:
    """Load the pipeline that `dags/retrain_kfp.py` defines.

    Raises:
        UsageError: If that file does not exist.
    """
    # Run as a file, because `dags/` is no package: Airflow and KFP read its files by path.
    path = code_identity.project_root() / "dags" / "retrain_kfp.py"
    if not path.is_file():
        raise UsageError(f"{path}: not found; compile from a checkout")
    pipeline: BaseComponent = runpy.run_path(str(path))["pipeline"](profile)
    return pipeline


def compile_to(out: Path, profile: ClusterProfile) -> None:
    """Write the pipeline as the YAML that KFP takes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(load_pipeline(profile), package_path=str(out))


def _container_component(function: Callable[..., dsl.ContainerSpec]) -> Callable[..., Any]:
    """Turn a function into a component; this gives kfp's untyped decorator a type."""
    component: Callable[..., Any] = dsl.container_component(function)
    return component


def _memory_output(step: Step) -> str:
    """Return the name of task 0's output with the memory of a step's pod."""
    return f"memory_{step.name}"


def _name_outputs(function: Callable[..., dsl.ContainerSpec], names: list[str]) -> None:
    """Replace the last parameter, which stands for any number of outputs, by these names in the signature kfp reads."""
    signature = inspect.signature(function)
    *parameters, last = signature.parameters.values()
    parameters += [last.replace(name=name, kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]


def _memory_without_plan(pod: PodConfig) -> str | None:
    """Return the memory that the profile gives a pod whatever the plan says; None: no limit."""
    if pod.memory_gib == "auto":
        return quantity(min(LIGHT_TASK_GIB, pod.max_memory_gib or LIGHT_TASK_GIB))
    return quantity(pod.memory_gib) if pod.memory_gib else None


def _configure_task(
    task: Any, name: str, image: str, retries: int, profile: ClusterProfile, pod: PodConfig, memory: Any
) -> Any:
    """Set what every task has: the graph's name in the UI, no cache, retries, and what the profile gives its pod.

    `memory` is a quantity, an output of another task, or None.
    """
    task.set_display_name(name)
    task.set_caching_options(enable_caching=False)
    # KFP retries whatever the exit code; a refusal is found in the store at once and costs seconds.
    task.set_retry(retries, backoff_duration="5s", backoff_factor=2.0, backoff_max_duration="300s")

    # One pipeline serves every line, so the hours are the profile's.
    timeout = deadlines.task_timeout(name, profile.max_step_hours, profile.max_training_hours)
    kubernetes.set_timeout(task, math.ceil(timeout.total_seconds()))

    if pod.cpus:
        task.set_cpu_request(f"{pod.cpus:g}")
    if memory is not None:
        task.set_memory_request(memory).set_memory_limit(memory)

    variables = {
        **profile.env,
        "QLORA_RETRAIN_IMAGE": image,
        "QLORA_RETRAIN_CACHE": f"{container_spec.WORK_DIR}/cache",
    }
    # The pipeline is compiled before a line is known, so `publish` has one secret with the keys of every line.
    key_secret = profile.key_secret(name if name not in (PLAN_TASK, SUMMARY_TASK) else PLANNER)
    if key_secret:
        variables[KEYS_VARIABLE] = credentials.KEYS_DIR
        kubernetes.use_secret_as_volume(task, key_secret, credentials.KEYS_DIR)
    for variable, value in variables.items():
        task.set_env_variable(variable, value)

    kubernetes.set_security_context(task, run_as_user=USER_ID, run_as_group=USER_ID, run_as_non_root=True)
    # Not a persistent volume claim: a new disk belongs to root, and KFP has no setting for `fsGroup`.
    # Its size is fixed when the pipeline is compiled, so `auto` is the default here.
    disk_gib = DEFAULT_DISK_GIB if profile.disk_gib == "auto" else profile.disk_gib
    kubernetes.empty_dir_mount(task, "work", container_spec.WORK_DIR, size_limit=quantity(disk_gib))

    for label, value in pod.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for taint in pod.tolerations:
        kubernetes.add_toleration(task, **taint.model_dump(exclude_none=True))
    for secret in profile.secrets:
        kubernetes.use_secret_as_volume(task, secret.name, secret.mount)
    if profile.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(profile.image_pull_secrets))
    return task
