"""Decide from the pod of the last try how much memory the next one gets, and whether there is a next one.

A failed pod is kept until the next try, so its status and annotations pass on what later tries need: its memory
limit, and how often the step died with each exit code.

    killed for memory:            again, with 1.5 times the memory, up to the profile's `max_memory_gib`
    the same, and no              one more try with the same memory, in case the node was the problem
      `max_memory_gib`:
    any other signal:             again, within the graph's retries of the step
    ended by the cluster:         not counted here; Airflow's retries are the limit

After the last try the pod is deleted, so a task that is cleared starts from the beginning. The functions here are pure:
they read a pod as the API shows it, and change nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import Cause, Exit, may_retry
from qlora_retrain.runtimes.kubernetes import pod_spec, pod_status
from qlora_retrain.runtimes.kubernetes.pod_status import PodEnding

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile
    from qlora_retrain.config.platform import RuntimeConfig
    from qlora_retrain.core.graph import Step

_DEATHS_ANNOTATION = "qlora-retrain.died-of-"  # followed by the exit code


def next_memory_gib(
    pod: Any, ending: PodEnding | None, step: Step, profile: ClusterProfile, runtime: RuntimeConfig
) -> float | None:
    """Return the memory in GiB for the next pod: more if this one was killed for memory.

    It is never less than this pod had, nor less than the settings say now.
    """
    # The pod's own limit is the only record of how far earlier tries have raised the memory.
    previous_gib = pod_status.memory_limit_gib(pod)
    killed_for_memory = ending is not None and ending.exit_code == Exit.OUT_OF_MEMORY
    increased_gib = pod_spec.increased_memory_gib(previous_gib, step, profile) if killed_for_memory else None
    return max(
        filter(None, (previous_gib, increased_gib, pod_spec.first_memory_gib(step, profile, runtime))), default=None
    )


def death_annotations(pod: Any, ending: PodEnding | None, memory_gib: float | None) -> dict[str, str]:
    """Count how often the step died, as annotations of the next pod, which gets `memory_gib`."""
    counts = {
        name: text for name, text in (pod.metadata.annotations or {}).items() if name.startswith(_DEATHS_ANNOTATION)
    }
    if ending is not None and _is_signal(ending.exit_code):
        counts[f"{_DEATHS_ANNOTATION}{ending.exit_code}"] = str(_previous_deaths(pod, ending.exit_code) + 1)

    # Deaths with less memory say nothing about the pod that gets more.
    if memory_gib != pod_status.memory_limit_gib(pod):
        counts.pop(f"{_DEATHS_ANNOTATION}{int(Exit.OUT_OF_MEMORY)}", None)
    return counts


def decide_retry(pod: Any, ending: PodEnding, step: Step, profile: ClusterProfile) -> tuple[bool, str]:
    """Decide whether another pod is created after one with this ending.

    Returns:
        The decision, and an explanation for the task's message; empty where there is nothing to add.
    """
    exit_code = ending.exit_code
    if not _is_signal(exit_code):
        return may_retry(exit_code), ""

    previous_deaths = _previous_deaths(pod, exit_code)
    if exit_code != Exit.OUT_OF_MEMORY:
        return previous_deaths < step.retries, f"{previous_deaths + 1} such ends by now" if previous_deaths else ""
    if ending.as_ending(step.name).cause == Cause.GPU_OOM:
        return False, "more of the host's memory would not help"

    # From the pod itself, because the profile may have changed since it was created.
    previous_gib, max_gib = pod_status.memory_limit_gib(pod), profile.pod(step).max_memory_gib
    limit = f"its limit was {previous_gib:g} GiB" if previous_gib else "it had no limit of its own"
    if increased_gib := pod_spec.increased_memory_gib(previous_gib, step, profile):
        return True, f"{limit}; the next try gets {increased_gib:g} GiB"
    if previous_gib and max_gib:
        return (
            False,
            f"{limit}, the profile's max_memory_gib ({max_gib:g}) allows no more; raise it, or use smaller batches",
        )
    if previous_deaths:
        return (
            False,
            f"{limit}, as in an earlier try; set memory_gib and max_memory_gib in the profile, or use smaller batches",
        )
    return True, f"{limit}; the next try gets the same, once, because max_memory_gib is not set"


def _is_signal(exit_code: int) -> bool:
    return may_retry(exit_code) and exit_code != Exit.TRY_AGAIN


def _previous_deaths(pod: Any, exit_code: int) -> int:
    """Count the pods of this run that ended with this exit code before this one."""
    return int((pod.metadata.annotations or {}).get(f"{_DEATHS_ANNOTATION}{int(exit_code)}", "0"))
