"""One pod, by its name, over Kubernetes' API: made, read, waited for, deleted; and what it means to be refused."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

from kubernetes.client.exceptions import ApiException

from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.runtimes.kubernetes import pod_spec


@dataclass(frozen=True)
class PodApi:
    """A pod that may be there or not.

    Attributes:
        client: A CoreV1Api.
        namespace: Where.
        name: The pod's.
    """

    client: Any
    namespace: str
    name: str

    def read(self) -> Any:
        """The pod as it is now; None where there is none."""
        try:
            return self.client.read_namespaced_pod(self.name, self.namespace)
        except ApiException as error:
            if error.status != 404:
                raise
            return None

    def create(self, pod: Any) -> Any:
        """Make it, and return it as the API shows it; or the one of that name, where it was made already.

        Args:
            pod: A V1Pod of this name.
        """
        try:
            return self.client.create_namespaced_pod(
                self.namespace, self.client.api_client.sanitize_for_serialization(pod)
            )
        except ApiException as error:
            found = self.read() if error.status == 409 else None  # a lost answer, or a twin of this task
            if found is None:
                raise
            return found

    def delete(self, grace_seconds: int = pod_spec.GRACE_SECONDS) -> None:
        """Have it asked to stop, and removed once it has or the grace is over; with no grace, have it forgotten now."""
        try:
            self.client.delete_namespaced_pod(self.name, self.namespace, grace_period_seconds=grace_seconds)
        except ApiException as error:
            if error.status != 404:
                raise

    def wait_until_gone(self) -> None:
        """Wait for a pod that is being removed: it may be saving its work, and there are never two.

        Raises:
            TryAgain: If it is still there when its grace is long over.
        """
        deadline = time.monotonic() + pod_spec.GRACE_SECONDS + 30
        while self.read() is not None:
            if time.monotonic() > deadline:
                raise TryAgain(f"pod {self.name} is still being removed; its node may be lost")
            time.sleep(1)

    def log(self, since: datetime | None) -> Iterator[str]:
        """The lines that it wrote since then; none where no container began, or where they are gone with it."""
        seconds = math.ceil((datetime.now(UTC) - since).total_seconds()) if since else None
        try:
            answer = self.client.read_namespaced_pod_log(
                self.name, self.namespace, container=pod_spec.CONTAINER, since_seconds=seconds, _preload_content=False
            )
        except ApiException as error:
            if error.status not in (400, 404):
                raise
            return iter(())
        return (line.decode("utf-8", "replace") for line in answer)

    def warnings(self, uid: str) -> list[Any]:
        """What the cluster warned of, oldest first, of the pod with this uid: others had its name before it."""
        found = self.client.list_namespaced_event(
            self.namespace, field_selector=f"involvedObject.uid={uid},type=Warning"
        )
        return sorted(found.items, key=lambda e: e.last_timestamp or e.event_time or e.metadata.creation_timestamp)


def refused(step: str, namespace: str, error: ApiException) -> NoReturn:
    """End a task whose pod the API did not take: what may pass is tried again, what is wrong is said."""
    said = _message(error)
    if error.status == 403 and "exceeded quota" in said:
        raise TryAgain(f"{step}: the namespace's quota is used up: {said}") from error
    if error.status == 401 or (error.status == 403 and 'User "' in said and " cannot " in said):
        raise UsageError(f"{step}: Airflow may not manage pods in {namespace}: {said}; see manifests/base/rbac.yaml")
    if error.status is not None and error.status not in (409, 429) and 400 <= error.status < 500:
        raise UsageError(f"{step}: the cluster refuses the pod ({error.status}): {said}") from error
    raise TryAgain(f"{step}: the Kubernetes API failed ({error.status}): {said}") from error


def _message(error: ApiException) -> str:
    """The API's own words, without headers."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
