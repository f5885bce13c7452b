"""Calls to the Kubernetes API about one pod: create, read, wait, delete; and the meaning of the API's errors."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, NoReturn

from kubernetes.client.exceptions import ApiException

from qlora_retrain.core.errors import Cause, TryAgain, UsageError
from qlora_retrain.runtimes import foreign_messages
from qlora_retrain.runtimes.kubernetes import pod_spec

# An API server that starts refuses accounts that are allowed (401, 403), until it has read the roles.
_PAUSES_WHILE_REFUSED_SECONDS = (15, 30)


class LogUnavailable(Exception):
    """The API answered, but its node has no log of the container any more."""


@dataclass(frozen=True)
class PodApi:
    """The calls about one pod, which may or may not exist.

    Attributes:
        client: A CoreV1Api.
        namespace: The pod's namespace.
        name: The pod's name.
    """

    client: Any
    namespace: str
    name: str

    def read(self) -> Any:
        """Return the pod as it is now; None where there is none."""
        try:
            return _repeat_while_refused(lambda: self.client.read_namespaced_pod(self.name, self.namespace))
        except ApiException as error:
            if error.status != 404:
                raise
            return None

    def create(self, pod: Any) -> Any:
        """Create the pod and return it as the API shows it; return the one of that name where it exists already.

        Args:
            pod: A V1Pod of this name.
        """
        body = self.client.api_client.sanitize_for_serialization(pod)
        try:
            return _repeat_while_refused(lambda: self.client.create_namespaced_pod(self.namespace, body))
        except ApiException as error:
            # 409 means that the name is taken: the answer to an earlier request was lost, or this task runs twice.
            existing = self.read() if error.status == 409 else None
            if existing is None:
                raise
            return existing

    def delete(self, grace_period_seconds: int = pod_spec.GRACE_PERIOD_SECONDS) -> None:
        """Request the pod's deletion; Kubernetes removes it when it has stopped, or when the grace period is over.

        With a grace period of 0 the API server forgets the pod at once, without waiting for its node.
        """
        try:
            self.client.delete_namespaced_pod(self.name, self.namespace, grace_period_seconds=grace_period_seconds)
        except ApiException as error:
            if error.status != 404:
                raise

    def add_label(self, label: str, value: str) -> None:
        """Add a label to the pod; do nothing where there is none."""
        try:
            self.client.patch_namespaced_pod(self.name, self.namespace, {"metadata": {"labels": {label: value}}})
        except ApiException as error:
            if error.status != 404:
                raise

    def wait_until_deleted(self) -> None:
        """Wait until a pod that is being deleted is gone: it may be saving its work, and two must never run.

        Raises:
            TryAgain: If it still exists 30 seconds after its grace period.
        """
        # 30 seconds more than Kubernetes itself waits before it kills the container.
        deadline = time.monotonic() + pod_spec.GRACE_PERIOD_SECONDS + 30
        while self.read() is not None:
            if time.monotonic() > deadline:
                raise TryAgain(f"pod {self.name} is still being removed; its node may be lost", cause=Cause.NODE_LOST)
            time.sleep(1)

    def log(self, since: datetime | None) -> Iterator[str]:
        """Return the lines that the container printed since then; none where it never started or the pod is gone.

        Raises:
            LogUnavailable: If the pod's node has removed the log.
        """
        since_seconds = log_seconds(datetime.now(UTC) - since) if since else None
        try:
            response = self.client.read_namespaced_pod_log(
                self.name,
                self.namespace,
                container=pod_spec.CONTAINER_NAME,
                since_seconds=since_seconds,
                _preload_content=False,
            )
        except ApiException as error:
            if error.status not in (400, 404):
                raise
            return iter(())

        lines = (line.decode("utf-8", "replace") for line in response)
        first_line = next(lines, "")
        # With the status of a success, and in the place of the log.
        if foreign_messages.LOG_IS_GONE.match(first_line):
            raise LogUnavailable(first_line.strip())
        return chain([first_line], lines) if first_line else iter(())

    def events(self, uid: str, *, selector: str = "") -> list[Any]:
        """List the cluster's events about the pod with this uid, oldest first.

        The uid matters, because earlier pods of this run had the same name.

        Args:
            uid: The pod's uid.
            selector: A further field selector, e.g. `type=Warning`.
        """
        events = self.client.list_namespaced_event(
            self.namespace, field_selector=",".join(filter(None, (f"involvedObject.uid={uid}", selector)))
        )
        return sorted(events.items, key=lambda e: e.last_timestamp or e.event_time or e.metadata.creation_timestamp)


def log_seconds(age: timedelta) -> int:
    """Return for how many seconds to request the log that is not older than `age`; the API refuses less than 1."""
    # Rounded up, because a line that is logged twice does no harm, but a lost one may be the reason of the failure. The
    # age is negative where the clock of the machine that read the log before is ahead of this one's.
    return max(1, math.ceil(age.total_seconds()))


def raise_for_rejected_pod(namespace: str, error: ApiException) -> NoReturn:
    """Turn the API's refusal of a pod into an error that says whether another try may help.

    Raises:
        TryAgain: For what may pass: a full quota, a conflict, too many requests, a failing API server.
        UsageError: For what stays wrong: missing permissions, an invalid or forbidden pod.
    """
    message = _api_message(error)
    if error.status == 403 and foreign_messages.QUOTA_EXCEEDED.search(message):
        raise TryAgain(f"the namespace's quota is used up: {message}", cause=Cause.NOT_STARTED) from error
    if error.status == 401:
        raise UsageError(
            f"the Kubernetes API does not accept Airflow's token or certificate (401): {message}; check the account of "
            "Airflow's pods, or the kubeconfig of its Kubernetes connection"
        ) from error
    # 403 has two meanings. RBAC's message is `User "..." cannot create resource ...`; that of admission differs.
    if error.status == 403 and foreign_messages.NOT_PERMITTED.search(message):
        raise UsageError(
            f"Airflow may not manage pods in {namespace}: {message}; apply manifests/base/rbac.yaml"
        ) from error
    if error.status is not None and error.status not in (409, 429) and 400 <= error.status < 500:
        raise UsageError(f"the cluster refuses the pod ({error.status}): {message}") from error
    raise TryAgain(f"the Kubernetes API failed ({error.status}): {message}", cause=Cause.THROTTLED) from error


def _repeat_while_refused(call: Callable[[], Any]) -> Any:
    """Return what a call returns; make it twice more where the API refuses the account, with pauses between."""
    for pause_seconds in _PAUSES_WHILE_REFUSED_SECONDS:
        try:
            return call()
        except ApiException as error:
            # A full quota is refused with 403 too, but lasts longer than these pauses.
            if error.status not in (401, 403) or foreign_messages.QUOTA_EXCEEDED.search(_api_message(error)):
                raise
        time.sleep(pause_seconds)
    return call()


def describe(error: Exception) -> str:
    """Format an error of a call in one line; the text of an ApiException has the headers of the answer too."""
    return f"{error.status}: {_api_message(error)}" if isinstance(error, ApiException) else str(error)


def _api_message(error: ApiException) -> str:
    """Return the message of the API's answer, without its headers."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
