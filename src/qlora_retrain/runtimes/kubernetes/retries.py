"""What a try learns from the pod of the one before: the memory that it gets, and whether it would only end so again.

A failed pod is kept until the next try, so it is where this is remembered: its limit, and in its annotations how often
the step died before. Killed for memory, the next one gets half as much more, up to the profile's `max_memory_gib`;
where there is no more to give, one plain retry finds out whether it was the node. Any other signal is tried again
within the graph's retries of the step. What the cluster does to a pod is not counted: Airflow's retries bound it.
After the last try the pod goes, and a task that is cleared begins anew.

Pure functions of a pod as the API shows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import OF_THE_GPU, Exit, may_retry
from qlora_retrain.runtimes.kubernetes import pod_spec, pod_status
from qlora_retrain.runtimes.kubernetes.pod_status import Ending

if TYPE_CHECKING:
    from qlora_retrain.config.profile import Profile
    from qlora_retrain.config.sections import RuntimeConfig
    from qlora_retrain.core.graph import Step

_DIED = "qlora-retrain.died-of-"  # and the exit code


def memory_gib(pod: Any, ended: Ending | None, step: Step, profile: Profile, runtime: RuntimeConfig) -> float | None:
    """GiB for the pod after this one: more if it was killed for memory, never less than it had or than is set now."""
    had = pod_status.memory_gib(pod)
    killed = ended is not None and ended.code == Exit.OUT_OF_MEMORY
    more = pod_spec.more_memory(had, step, profile) if killed else None
    return max(filter(None, (had, more, pod_spec.memory_of(step, profile, runtime))), default=None)


def counts(pod: Any, ended: Ending | None, memory_gib: float | None) -> dict[str, str]:
    """How often the step died, as annotations of the pod after this one, which gets `memory_gib`."""
    found = {name: text for name, text in (pod.metadata.annotations or {}).items() if name.startswith(_DIED)}
    if ended is not None and _is_signal(ended.code):
        found[f"{_DIED}{ended.code}"] = str(_died(pod, ended.code) + 1)
    if memory_gib != pod_status.memory_gib(pod):
        found.pop(f"{_DIED}{int(Exit.OUT_OF_MEMORY)}", None)
    return found


def again(pod: Any, code: int, step: Step, profile: Profile) -> tuple[bool, str]:
    """Whether a pod that ended with this code is followed by another, and what is told of it."""
    if not _is_signal(code):
        return may_retry(code), ""
    before = _died(pod, code)
    if code != Exit.OUT_OF_MEMORY:
        return before < step.retries, f"{before + 1} times by now" if before else ""
    if OF_THE_GPU in pod_status.said(pod):
        return False, "more of the host's memory would not help"
    had, most = pod_status.memory_gib(pod), profile.pod(step).max_memory_gib
    limit = f"its limit was {had:g} GiB" if had else "it had no limit of its own"
    if more := pod_spec.more_memory(had, step, profile):
        return True, f"{limit}, the next try gets {more:g} GiB"
    if had and most:
        return False, f"{limit}, all that the profile's max_memory_gib ({most:g}) allows: lower the batch, or raise it"
    if before:
        return False, f"{limit}, as the last time: set memory_gib and max_memory_gib in the profile, or lower the batch"
    return True, f"{limit}, the next try gets the same, once (no max_memory_gib)"


def _is_signal(code: int) -> bool:
    return may_retry(code) and code != Exit.TRY_AGAIN


def _died(pod: Any, code: int) -> int:
    """How many pods of this run ended so before this one."""
    return int((pod.metadata.annotations or {}).get(f"{_DIED}{int(code)}", "0"))
