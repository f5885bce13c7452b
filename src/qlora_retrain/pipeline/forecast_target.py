"""Find out on what a plan's training runs: the card that was asked for, the platform's, or this machine."""

from __future__ import annotations

import os
from typing import Any

from qlora_retrain.config import cluster_profile, gpus, platform
from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.core import graph
from qlora_retrain.core.graph import Step
from qlora_retrain.pipeline.forecast import GIB, Target
from qlora_retrain.pipeline.plan import Plan


def find_profile(plan: Plan) -> ClusterProfile | None:
    """Return the cluster's profile, where the line's steps are pods and the variable names one."""
    is_cluster = platform.load().runtime_of(plan.line).kind == "kubernetes"
    if not is_cluster or not os.environ.get(cluster_profile.PROFILE_VARIABLE):
        return None
    return cluster_profile.from_environment()


def configured_memory_gib(plan: Plan, step: Step) -> float | None:
    """Return the GiB of memory that a step gets, or with `auto` gets at most; None: no limit."""
    runtime, profile = platform.load().runtime_of(plan.line), find_profile(plan)
    pod = profile.pod(step) if profile else None
    configured = runtime.memory_gib or (pod.memory_gib if pod else None)
    if configured == "auto":
        return pod.max_memory_gib if pod else None
    return configured


def card_name(plan: Plan, requested: str | None) -> str | None:
    """Return the card that was asked for, else that of the profile or of the platform; None without any."""
    runtime, profile = platform.load().runtime_of(plan.line), find_profile(plan)
    is_on_gpu = _train(plan)["device"] == "cuda"
    named = (profile.gpu_card if profile else None) or runtime.gpu
    return requested or (named if is_on_gpu else None)


def find_target(plan: Plan, card: str | None) -> Target:
    """Return what the training runs on.

    Args:
        plan: The plan.
        card: A card's name; None: the memory that the platform gives the step, or this machine has.

    Raises:
        UsageError: If no card has the name.
    """
    settings = platform.load()
    if card is not None:
        gpu = gpus.find_card(card, settings.gpus)
        flops = gpu.tflops * 1e12 if gpu.tflops else None
        return Target(
            f"{gpu.name} ({gpu.memory_gib:g} GiB)",
            round(gpu.memory_gib * GIB),
            flops,
            gpu.price_per_hour,
        )
    if _train(plan)["device"] == "cuda":
        return Target("the GPU, whose name nobody has said", None)

    memory_gib = configured_memory_gib(plan, graph.step(graph.producer_name("adapter")))
    if memory_gib:
        return Target(f"the {memory_gib:g} GiB of the step", round(memory_gib * GIB / _train(plan)["num_processes"]))
    if settings.runtime_of(plan.line).kind == "kubernetes":
        return Target("the pod, whose memory nobody limits", None)
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    label = f"the {machine_bytes / GIB:.0f} GiB of this machine"
    return Target(label, machine_bytes // _train(plan)["num_processes"])


def _train(plan: Plan) -> dict[str, Any]:
    return plan.step(graph.producer_name("adapter")).config
