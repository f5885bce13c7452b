"""Set the memory and the disk of a step's pod where the platform or the profile says `auto`.

The planner's estimate (`pipeline.pod_sizes`) is made when a pod is created, since a later step knows more than the
plan: the files of a fetched base, the lengths of the rows, what earlier runs measured. It is in no plan and no key. A
number in `platform.yaml` or in the profile always wins, and memory stays below the profile's `max_memory_gib`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qlora_retrain.core.graph import Step

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile
    from qlora_retrain.config.platform import RuntimeConfig
    from qlora_retrain.pipeline.plan import Plan


def follows_plan(step: Step, profile: ClusterProfile, runtime: RuntimeConfig) -> bool:
    """Return whether the memory or the disk of a step's pod is `auto`."""
    return "auto" in (runtime.memory_gib or profile.pod(step).memory_gib, runtime.disk_gib or profile.disk_gib)


def with_numbers(
    plan: Plan, step: Step, profile: ClusterProfile, runtime: RuntimeConfig
) -> tuple[RuntimeConfig, str | None]:
    """Return the platform's settings with a number for each `auto`, and the reason where nothing can be estimated.

    Without an estimate, a pod gets what the profile gives it, else its `max_memory_gib` and 100 GiB of disk.
    """
    from qlora_retrain.pipeline.forecast import NotEstimated
    from qlora_retrain.pipeline.pod_sizes import planned_sizes

    size, failure = None, None
    try:
        size = planned_sizes(plan)[step.name]
    except NotEstimated as reason:
        failure = str(reason)

    pod, numbers = profile.pod(step), dict[str, float | None]()
    if (runtime.memory_gib or pod.memory_gib) == "auto":
        profile_gib = pod.max_memory_gib if pod.memory_gib == "auto" else pod.memory_gib
        numbers["memory_gib"] = min(size.memory_gib, pod.max_memory_gib or math.inf) if size else profile_gib
    if size and (runtime.disk_gib or profile.disk_gib) == "auto":
        numbers["disk_gib"] = float(size.disk_gib)
    elif runtime.disk_gib == "auto":
        numbers["disk_gib"] = None  # the profile's
    return runtime.model_copy(update=numbers), failure
