"""Choose the operator of a step: the class of the runtime that the platform has for a line, and its arguments."""

from __future__ import annotations

from typing import Any

from qlora_retrain.config import platform
from qlora_retrain.config.line import LineConfig
from qlora_retrain.core.aliases import alias_of_run
from qlora_retrain.core.graph import Step
from qlora_retrain.runtimes import deadlines
from qlora_retrain.runtimes.airflow import lineage
from qlora_retrain.runtimes.airflow.local import LocalStepOperator
from qlora_retrain.runtimes.airflow.operators import StepOperator


def step_operator(step: Step, config: LineConfig, line: str | None = None) -> tuple[type[StepOperator], dict[str, Any]]:
    """Return the class and the arguments of a step's task.

    Args:
        step: The step.
        config: The line.
        line: The line that the plans name; None: that of `config`.
    """
    line = line or config.line
    runtime = platform.load().runtime_of(line)
    common = {
        "task_id": step.name,
        "task_display_name": step.title,
        "step": step.name,
        "line": line,
        "alias": alias_of_run(config.publish.promote_to, has_approval=config.publish.approval),
        "execution_timeout": deadlines.line_timeout(config, step.name),
        "inlets": lineage.inlets(step, config),
    }

    # One slot for each GPU, so that Airflow starts no more steps than there are GPUs.
    num_gpus = config.train.num_processes if step.section == "train" else step.gpus
    pool = {"pool": runtime.gpu_pool, "pool_slots": num_gpus} if runtime.gpu_pool and num_gpus else {}

    # Imported only where a line uses them, because DAG files are parsed again and again and providers import slowly.
    if runtime.kind == "docker":
        from qlora_retrain.runtimes.airflow.docker import DockerStepOperator

        return DockerStepOperator, {"runtime": runtime, **common, **pool}
    if runtime.kind == "kubernetes":
        from qlora_retrain.config import cluster_profile
        from qlora_retrain.runtimes.airflow.kubernetes import KubernetesStepOperator

        profile = cluster_profile.from_environment()
        pool = {"pool": profile.gpu_pool, "pool_slots": profile.gpus(step)} if profile.gpu_pool else {}
        return KubernetesStepOperator, {
            "runtime": runtime, "profile": profile, **common, **(pool if profile.gpus(step) else {})
        }  # fmt: skip
    return LocalStepOperator, {**common, **pool}
