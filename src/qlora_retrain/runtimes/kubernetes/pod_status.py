"""How a pod ended, as an exit code of `errors.py`: what the container says, and what the cluster did to it.

    the container's own exit code             stands, unless the cluster ended it (below)
    OOMKilled, or 137 that the step explains  137: tried again, with more memory where the profile allows it
    OOMKilled, and a code that a step chose   stands: the kernel killed one of its processes, and it went on
    137 that nobody explains                  -9: killed by a signal, tried again as it was
    Evicted, Preempting, DisruptionTarget,    75: tried again, from the last checkpoint
      a node that shuts down, restarts or is lost
    Evicted for more disk than the pod may    12: it would need as much again; the message names the setting
    a container that the runtime cannot start 75: a node whose GPU driver is broken, say; there are others
    a pod that is gone                        75: its node went, or somebody deleted it
    a pod whose node is silent for long       75: given up, though the cluster still shows it as running
    an image that cannot be pulled            75: registries fail for minutes; the message names the image
    a name that is wrong, a secret that is    12: nothing gets better by waiting
      missing

Pure functions of a pod as the API shows it.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from qlora_retrain.core.errors import Exit
from qlora_retrain.runtimes.kubernetes.pod_spec import CONTAINER

# A silent node is not ready within a minute, Kubernetes deletes its pods after five more, and they have two of grace.
LOST_SECONDS = 600
_UNPULLED = ("ErrImagePull", "ImagePullBackOff", "RegistryUnavailable")
_UNSTARTED = ("StartError", "ContainerCannotRun", "RunContainerError")
_UNUSABLE = ("InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError", "CreateContainerError")
_CHOSEN = set(Exit) - {Exit.BUG, Exit.OUT_OF_MEMORY}
_BY_THE_CLUSTER = (Exit.OUT_OF_MEMORY, Exit.TRY_AGAIN, 143)  # exit codes that a pod has when it is taken away
# As the kubelet says it of a pod's own limits; a node whose disk is full is "low on resource".
_ITS_DISK = re.compile('EmptyDir volume "work" exceeds|local ephemeral storage limit|ephemeral local storage usage')
_ITS_VOLUME = re.compile("EmptyDir volume .* exceeds")
_MISSING = re.compile('(secret|configmap) "[^"]*" not found')


@dataclass(frozen=True)
class Ending:
    """How a pod ended.

    Attributes:
        code: 0, or what `errors.describe` explains.
        why: What the cluster says of it; empty where the step's own output says it.
        said: The end of the step's output, where the kubelet kept it.
    """

    code: int
    why: str = ""
    said: str = ""


def ending(pod: Any) -> Ending | None:
    """How a pod ended; None while it may go on by itself.

    Args:
        pod: A V1Pod.
    """
    status = pod.status
    done = _terminated(pod)
    taken = _taken_away(pod)
    if done is None:
        if status.phase in ("Failed", "Succeeded"):
            return _away(taken or f"the pod {status.phase.lower()} before its container ran")
        return None
    said = done.message or ""
    if done.reason in _UNSTARTED:  # the message is the runtime's, and there is no output
        return Ending(Exit.TRY_AGAIN, f"the container did not start: {done.reason}: {said}".rstrip(": "))
    if done.reason == "ContainerStatusUnknown":  # 137 too, though nothing was killed for memory
        return Ending(Exit.TRY_AGAIN, "ContainerStatusUnknown: the node lost its container, as when it restarts", said)
    if taken and done.exit_code in _BY_THE_CLUSTER:  # before OOMKilled, which may be of a process that is long gone
        return _away(taken, said)
    if done.reason == "OOMKilled" and done.exit_code not in _CHOSEN:
        return Ending(Exit.OUT_OF_MEMORY, "OOMKilled", said)
    if done.exit_code == Exit.OUT_OF_MEMORY and f"({int(Exit.OUT_OF_MEMORY)})" not in said:
        return Ending(-signal.SIGKILL, "nothing says that it was for memory", said)
    return Ending(int(done.exit_code), said=said)


def lost(pod: Any) -> Ending | None:
    """Why a pod is given up that the cluster still shows; None where its node may yet say how it ended.

    A node that nobody reaches says nothing more: its container is shown as running, the pod as not ready, then as being
    deleted, until somebody removes the node.
    """
    ready = next((c for c in pod.status.conditions or () if c.type == "Ready" and c.status != "True"), None)
    silent = ready.last_transition_time if ready is not None and running(pod) else None
    if _is_long_ago(pod.metadata.deletion_timestamp):
        return Ending(
            Exit.TRY_AGAIN, f"the pod was to be gone by {pod.metadata.deletion_timestamp:%H:%M} UTC: node lost"
        )
    if _is_long_ago(silent):
        return Ending(Exit.TRY_AGAIN, f"nothing was heard of the pod's node since {silent:%H:%M} UTC: node lost")
    return None


def stuck(pod: Any) -> Ending | None:
    """Why a pod does not begin; None where nothing hinders it, or it runs."""
    waiting = next((s.state.waiting for s in pod.status.container_statuses or () if s.name == CONTAINER), None)
    if waiting is not None and waiting.reason in (*_UNPULLED, *_UNSTARTED, *_UNUSABLE):
        image = next(c.image for c in pod.spec.containers if c.name == CONTAINER)
        code = Exit.USAGE if waiting.reason in _UNUSABLE else Exit.TRY_AGAIN
        return Ending(code, f"the pod did not start: {waiting.reason} ({image}): {waiting.message or ''}".rstrip(": "))
    return None


def late(pod: Any, warnings: Sequence[Any], waited: str) -> Ending:
    """Why a pod has not begun in the time that it has for that.

    Args:
        pod: A V1Pod.
        warnings: The cluster's, of this pod, as events; the last one counts.
        waited: What the trigger says.
    """
    told = [f"{event.reason}: {event.message}" for event in warnings]
    if missing := next((text for text in told if _MISSING.search(text)), None):
        return Ending(Exit.USAGE, f"the pod did not start: {missing}")
    conditions = pod.status.conditions or ()
    unscheduled = next((c for c in conditions if c.type == "PodScheduled" and c.status == "False"), None)
    if unscheduled:
        return Ending(Exit.TRY_AGAIN, f"no node takes the pod: {unscheduled.message or unscheduled.reason}")
    return Ending(Exit.TRY_AGAIN, "; ".join((waited, *told[-1:])))


def running(pod: Any) -> bool:
    """Whether its container runs, as far as the cluster knows."""
    return any(s.state and s.state.running for s in pod.status.container_statuses or () if s.name == CONTAINER)


def said(pod: Any) -> str:
    """What its container left to be read; empty where there is no pod, or nothing."""
    done = _terminated(pod) if pod is not None else None
    return (done.message or "") if done is not None else ""


def memory_gib(pod: Any) -> float | None:
    """The memory that the step was allowed; None without a limit."""
    container = next(c for c in pod.spec.containers if c.name == CONTAINER)
    limit = (container.resources.limits or {}).get("memory") if container.resources else None
    return float(parse_quantity(limit)) / 2**30 if limit else None


def _terminated(pod: Any) -> Any:
    statuses = pod.status.container_statuses or ()
    return next((s.state.terminated for s in statuses if s.name == CONTAINER and s.state), None)


def _is_long_ago(then: datetime | None) -> bool:
    return then is not None and (datetime.now(UTC) - then).total_seconds() > LOST_SECONDS


def _taken_away(pod: Any) -> str:
    """What the cluster says of a pod that it ended; empty where it did not."""
    status = pod.status
    disruption = next((c for c in status.conditions or () if c.type == "DisruptionTarget" and c.status == "True"), None)
    if status.reason:  # Evicted, Preempting, NodeLost, Shutdown, OutOfcpu, UnexpectedAdmissionError, ...
        return f"{status.reason}: {status.message or 'the cluster ended the pod'}"
    if disruption is not None:
        return f"DisruptionTarget, {disruption.reason}: {disruption.message or 'the cluster ended the pod'}"
    return "the pod was deleted while it ran" if pod.metadata.deletion_timestamp else ""


def _away(taken: str, said: str = "") -> Ending:
    """The end of a pod that the cluster took away: for others, or because it took more disk than it may."""
    if _ITS_DISK.search(taken):
        return Ending(
            Exit.USAGE, f"{taken.strip()} More is runtime.disk_gib in the line, work_gib in the profile", said
        )
    if _ITS_VOLUME.search(taken):
        return Ending(Exit.USAGE, f"{taken.strip()} No setting gives more", said)
    return Ending(Exit.TRY_AGAIN, taken, said)
