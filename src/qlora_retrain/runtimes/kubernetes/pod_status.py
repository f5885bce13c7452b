"""Read how a pod ended: from the ending that the step wrote, the container's state, and what the cluster did to it.

    the container's own exit code             stands, unless the cluster ended it (below)
    OOMKilled, or 137 in the step's ending    137: tried again, with more memory where the profile allows it
    OOMKilled, and a code that a step chose   stands: the kernel killed one of its processes, and the step went on
    137 for no reported reason                -9: killed by a signal, tried again with the same memory
    Evicted, Preempting, DisruptionTarget,    75: tried again, from the last checkpoint
      a node that shuts down, restarts or is lost
    Evicted for more disk than the pod may    12: the next try would need as much; the message names the setting
    DeadlineExceeded                          12: the next try would need as long; the message names the setting
    a container that the runtime cannot       75: for example a node with a broken GPU driver; other nodes may work
      create or start
    a container that its node lost            75: code 255, `Unknown` or `ContainerStatusUnknown`, as after a reboot;
                                              but if the pod has a reason of its own, that reason counts
    a pod that is gone                        what was last seen of it; created again at once, three times a try
    a pod whose node reports nothing          75: replaced after ten minutes, although the cluster shows it as running
    a pod that waits behind a scheduling gate no ending: it waits for runtime.max_queue_hours; then 12
    an image that cannot be pulled            75: registries fail for minutes; the message names the image
    a wrong image name, a missing secret      12: waiting does not help

Pure functions of a pod as the API shows it.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from qlora_retrain.core import endings
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause, Exit
from qlora_retrain.runtimes import deadlines, foreign_messages
from qlora_retrain.runtimes.docker import container_ending, container_spec
from qlora_retrain.runtimes.kubernetes.pod_spec import CONTAINER_NAME

# A node that reports nothing becomes "not ready" within a minute. Kubernetes deletes its pods five minutes later, and
# they have two minutes of grace. So after ten minutes no report of the pod's end will come.
LOST_NODE_SECONDS = 600
_PULL_FAILURES = ("ErrImagePull", "ImagePullBackOff", "RegistryUnavailable")
# CRI-O reports a broken GPU hook of one node as CreateContainerError.
_START_FAILURES = ("StartError", "ContainerCannotRun", "RunContainerError", "CreateContainerError")
_PERMANENT_FAILURES = ("InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError")
# Of a container that vanished: the kubelet's reason, and the one of containerd after its node has restarted.
_LOST_CONTAINER = ("ContainerStatusUnknown", "Unknown")
# Codes that only our own code returns; 1 and 137 also come from Python and from the kernel.
_STEP_EXIT_CODES = set(Exit) - {Exit.BUG, Exit.OUT_OF_MEMORY}
# Of a container that the cluster stopped (143: SIGTERM) or killed (137: SIGKILL).
_TERMINATED_EXIT_CODES = (Exit.OUT_OF_MEMORY, Exit.TRY_AGAIN, 143)


@dataclass(frozen=True)
class PodEnding:
    """How a pod ended.

    Attributes:
        exit_code: 0, or a code that `errors.describe` explains.
        cause: The cause, where the cluster reports one; None: that of the step's ending or of the exit code.
        reason: The cluster's message; empty where the cluster did not end the pod.
        step_ending: The ending that the step wrote; None where it was killed before, or never ran.
        last_lines: The end of the step's output, where it wrote no ending and the kubelet kept its output.
    """

    exit_code: int
    cause: Cause | None = None
    reason: str = ""
    step_ending: Ending | None = None
    last_lines: str = ""

    def as_ending(self, step: str, *, explanation: str = "", log_lines: str = "") -> Ending:
        """Return the ending of the step that ran in the pod.

        Args:
            step: The step.
            explanation: What the runtime adds for the person on call, e.g. the memory of the next try.
            log_lines: The end of the step's log; used where the pod's status has none of the output.
        """
        ending = Ending.from_process(step, self.exit_code, self.step_ending)
        last_output = (self.step_ending.reason if self.step_ending else "") or self.last_lines or log_lines
        # The cluster's message first: it is why the step's output ends where it does.
        message = "; last output: ".join(filter(None, (self.reason, last_output)))
        reason = "; ".join(filter(None, (explanation, message)))
        return dataclasses.replace(ending, cause=self.cause or ending.cause, reason=reason)


POD_IS_GONE = PodEnding(Exit.TRY_AGAIN, Cause.NODE_LOST, "the pod is gone: its node was lost, or somebody deleted it")
# Events that say why a pod was removed, the most telling first. They outlive the pod for about an hour.
_REMOVAL_EVENTS = ("Preempted", "TaintManagerEviction", "Evicted", "NodeNotReady", "Killing")
# Kubernetes' own condition, and that of Kueue.
_DISRUPTION_CONDITIONS = ("DisruptionTarget", "TerminationTarget")


def read_ending(pod: Any, log_ending: Ending | None = None) -> PodEnding | None:
    """Return how a pod ended; None while it runs or may still start.

    Args:
        pod: A V1Pod.
        log_ending: The ending in the step's log; used where the pod's termination message has none.
    """
    status = pod.status
    terminated = _terminated_state(pod)
    disrupted = disruption(pod)

    if terminated is None:
        if status.phase in ("Failed", "Succeeded"):
            return _disruption_ending(pod, disrupted or f"the pod {status.phase.lower()} before its container ran")
        return None

    message = terminated.message or ""
    # Here the message is from the container runtime: the step never ran, so it printed nothing.
    if terminated.reason in _START_FAILURES:
        reason = f"the container did not start: {terminated.reason}: {message}".rstrip(": ")
        return PodEnding(Exit.TRY_AGAIN, Cause.NOT_STARTED, reason)

    step_ending = endings.from_output(message) or log_ending
    last_lines = "" if step_ending or foreign_messages.NOT_OF_THE_STEP.match(message) else message.strip()
    # Before the exit code, which is 137 or 255 here, although nothing was killed for memory.
    if terminated.reason in _LOST_CONTAINER or terminated.exit_code == container_ending.UNKNOWN_EXIT_CODE:
        # An evicted pod may look like this too, and another node would not help one that used too much disk.
        if disrupted:
            return _disruption_ending(pod, disrupted, step_ending, last_lines)
        reason = f"{terminated.reason or 'Unknown'}: the node lost its container, as when it restarts"
        return PodEnding(Exit.TRY_AGAIN, Cause.NODE_LOST, reason, step_ending, last_lines)
    # Before OOMKilled, which may be about a process that died long before the eviction.
    if disrupted and terminated.exit_code in _TERMINATED_EXIT_CODES:
        return _disruption_ending(pod, disrupted, step_ending, last_lines)

    has_explained_137 = step_ending is not None and step_ending.code == Exit.OUT_OF_MEMORY
    if terminated.reason == "OOMKilled" and terminated.exit_code not in _STEP_EXIT_CODES:
        cause = None if has_explained_137 else Cause.HOST_OOM
        return PodEnding(Exit.OUT_OF_MEMORY, cause, "OOMKilled", step_ending, last_lines)
    if terminated.exit_code == Exit.OUT_OF_MEMORY and not has_explained_137:
        # More memory would be a guess, so the signal is reported as what it is.
        reason = "nothing shows that memory ran out"
        return PodEnding(-signal.SIGKILL, Cause.KILLED, reason, step_ending, last_lines)
    return PodEnding(int(terminated.exit_code), step_ending=step_ending, last_lines=last_lines)


def gone_ending(last_pod: Any, events: Sequence[Any]) -> PodEnding:
    """Return the ending of a pod that does not exist any more.

    Args:
        last_pod: The pod as it was last seen; None where nobody saw it.
        events: The cluster's events about this pod.
    """
    if last_pod is not None:
        if (ending := read_ending(last_pod)) is not None:
            return ending
        if any(_is_disruption(condition) for condition in last_pod.status.conditions or ()):
            return _disruption_ending(last_pod, f"the pod is gone: {disruption(last_pod)}")

    by_reason = {event.reason: event.message for event in events}
    if reason := next((reason for reason in _REMOVAL_EVENTS if reason in by_reason), None):
        return PodEnding(Exit.TRY_AGAIN, Cause.PREEMPTED, f"the pod is gone: {reason}: {by_reason[reason]}")
    return POD_IS_GONE


def lost_node(pod: Any) -> PodEnding | None:
    """Return the ending of a pod whose node is lost; None while the node may still report the pod's end.

    Kubernetes shows the container on a lost node as running, and the pod as not ready or as being deleted. This lasts
    until a person or the cloud provider removes the node.
    """
    not_ready = next((c for c in pod.status.conditions or () if c.type == "Ready" and c.status != "True"), None)
    silent_since = not_ready.last_transition_time if not_ready is not None and is_running(pod) else None
    if _is_long_ago(pod.metadata.deletion_timestamp):
        reason = f"the pod should have been removed by {pod.metadata.deletion_timestamp:%H:%M} UTC: node lost"
        return PodEnding(Exit.TRY_AGAIN, Cause.NODE_LOST, reason)
    if _is_long_ago(silent_since):
        reason = f"the pod's node has reported nothing since {silent_since:%H:%M} UTC: node lost"
        return PodEnding(Exit.TRY_AGAIN, Cause.NODE_LOST, reason)
    return None


def startup_failure(pod: Any) -> PodEnding | None:
    """Return the ending of a pod whose container cannot start; None where it runs, or nothing prevents its start."""
    waiting = next((s.state.waiting for s in pod.status.container_statuses or () if s.name == CONTAINER_NAME), None)
    if waiting is not None and waiting.reason in (*_PULL_FAILURES, *_START_FAILURES, *_PERMANENT_FAILURES):
        image = next(c.image for c in pod.spec.containers if c.name == CONTAINER_NAME)
        exit_code = Exit.USAGE if waiting.reason in _PERMANENT_FAILURES else Exit.TRY_AGAIN
        reason = f"the pod did not start: {waiting.reason} ({image}): {waiting.message or ''}".rstrip(": ")
        return PodEnding(exit_code, Cause.NOT_STARTED, reason)
    return None


def startup_timeout(pod: Any, warnings: Sequence[Any], trigger_message: str) -> PodEnding:
    """Return the ending of a pod whose container has not started within the startup timeout.

    Args:
        pod: A V1Pod.
        warnings: The cluster's warning events about this pod, oldest first; the last one counts.
        trigger_message: The trigger's message about the timeout.
    """
    if is_gated(pod):
        gates = ", ".join(gate.name for gate in pod.spec.scheduling_gates)
        reason = f"the pod waited behind its scheduling gates ({gates}) for longer than runtime.max_queue_hours; raise "
        reason += "that in platform.yaml, or ask who runs the queue"
        return PodEnding(Exit.USAGE, Cause.NOT_STARTED, reason)

    # A missing secret is reported only as an event; the pod's status just says ContainerCreating.
    messages = [f"{event.reason}: {event.message}" for event in warnings]
    if missing := next((text for text in messages if foreign_messages.MISSING_SECRET.search(text)), None):
        return PodEnding(Exit.USAGE, Cause.NOT_STARTED, f"the pod did not start: {missing}")

    # The scheduler's message names what no node has, e.g. a GPU or the memory.
    conditions = pod.status.conditions or ()
    unscheduled = next((c for c in conditions if c.type == "PodScheduled" and c.status == "False"), None)
    if unscheduled:
        reason = f"no node takes the pod: {unscheduled.message or unscheduled.reason}"
        return PodEnding(Exit.TRY_AGAIN, Cause.NOT_STARTED, reason)
    return PodEnding(Exit.TRY_AGAIN, Cause.NOT_STARTED, "; ".join((trigger_message, *messages[-1:])))


def is_running(pod: Any) -> bool:
    """Return whether the pod's container runs, as far as the cluster knows."""
    return any(s.state and s.state.running for s in pod.status.container_statuses or () if s.name == CONTAINER_NAME)


def is_gated(pod: Any) -> bool:
    """Return whether the pod waits behind a scheduling gate, as in a queue of Kueue: no node is looked for yet."""
    return pod.spec is not None and bool(pod.spec.scheduling_gates)


def memory_limit_gib(pod: Any) -> float | None:
    """Return the memory that the step was allowed, in GiB; None without a limit."""
    container = next(c for c in pod.spec.containers if c.name == CONTAINER_NAME)
    limit = (container.resources.limits or {}).get("memory") if container.resources else None
    return float(parse_quantity(limit)) / 2**30 if limit else None


def _terminated_state(pod: Any) -> Any:
    """Return the `terminated` state of the step's container; None while it has none."""
    statuses = pod.status.container_statuses or ()
    return next((s.state.terminated for s in statuses if s.name == CONTAINER_NAME and s.state), None)


def _is_long_ago(moment: datetime | None) -> bool:
    return moment is not None and (datetime.now(UTC) - moment).total_seconds() > LOST_NODE_SECONDS


def _is_disruption(condition: Any) -> bool:
    return condition.type in _DISRUPTION_CONDITIONS and condition.status == "True"


def disruption(pod: Any) -> str:
    """Return the cluster's message about a pod that it ends or has ended; empty where it does not end the pod."""
    status = pod.status
    condition = next((c for c in status.conditions or () if _is_disruption(c)), None)
    if status.reason:  # Evicted, Preempting, NodeLost, Shutdown, OutOfcpu, UnexpectedAdmissionError, ...
        return f"{status.reason}: {status.message or 'the cluster ended the pod'}"
    if condition is not None:
        return f"{condition.type}, {condition.reason}: {condition.message or 'the cluster ended the pod'}"
    return "the pod was deleted while it ran" if pod.metadata.deletion_timestamp else ""


def _disruption_ending(pod: Any, message: str, step_ending: Ending | None = None, last_lines: str = "") -> PodEnding:
    """Return the ending of a pod that the cluster ended: to make room, or because it used too much disk or time."""
    if pod.status.reason == "DeadlineExceeded":
        timeout = timedelta(seconds=pod.spec.active_deadline_seconds or 0)
        reason = f"DeadlineExceeded: {deadlines.message(pod.metadata.labels[container_spec.STEP_LABEL], timeout)}"
        return PodEnding(Exit.USAGE, Cause.TIME_BUDGET, reason, step_ending, last_lines)
    if foreign_messages.WORK_VOLUME_FULL.search(message):
        reason = f"{message.strip()} Set a larger runtime.disk_gib in platform.yaml, or disk_gib in the profile"
        return PodEnding(Exit.USAGE, Cause.DISK_FULL, reason, step_ending, last_lines)
    if foreign_messages.OTHER_VOLUME_FULL.search(message):
        reason = f"{message.strip()} The size of that volume is fixed: no setting raises this limit"
        return PodEnding(Exit.USAGE, Cause.DISK_FULL, reason, step_ending, last_lines)
    return PodEnding(Exit.TRY_AGAIN, Cause.PREEMPTED, message, step_ending, last_lines)
