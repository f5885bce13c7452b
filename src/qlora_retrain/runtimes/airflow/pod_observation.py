"""What a trigger last saw of a pod, as data in its event: the pod may be gone before the task wakes.

Kubernetes removes a pod about a second after its container has ended, and a task wakes several seconds later. By then
only the trigger knows why the cluster ended the pod, and what the step printed last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from kubernetes.client import ApiClient

# What the ending and the next pod are decided by. The rest of a pod, such as its variables, stays with the API server.
_METADATA = ("name", "uid", "labels", "annotations", "deletionTimestamp")
_CONTAINER = ("name", "image", "resources")
_STATUS = ("phase", "reason", "message", "conditions", "containerStatuses")
_KEY = "observation"


@dataclass(frozen=True)
class Observation:
    """What was last seen of a pod.

    Attributes:
        pod: The V1Pod, with the fields that the functions of `pod_status` and `retries` read; None where it was not
            seen.
        last_lines: The end of what the step printed; empty where nothing was read.
        followed_seconds: For how long the API answered requests for the pod.
    """

    pod: Any = None
    last_lines: tuple[str, ...] = ()
    followed_seconds: float = 0.0

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> Observation:
        """Read the observation in a trigger's event; return an empty one where it has none."""
        fields = event.get(_KEY)
        if not fields:
            return cls()
        document = fields["pod"]
        pod = ApiClient().deserialize(SimpleNamespace(data=json.dumps(document)), "V1Pod") if document else None
        return cls(pod, tuple(fields["last_lines"]), float(fields["followed_seconds"]))

    def as_event_fields(self) -> dict[str, Any]:
        """Return the fields to add to a trigger's event, as JSON can hold them."""
        document = None if self.pod is None else _selected_fields(ApiClient().sanitize_for_serialization(self.pod))
        fields = {
            "pod": document,
            "last_lines": list(self.last_lines),
            "followed_seconds": self.followed_seconds,
        }
        return {_KEY: fields}


def _selected_fields(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return {
        "metadata": _pick(document["metadata"], _METADATA),
        "spec": {
            **_pick(spec, ("activeDeadlineSeconds",)),
            "containers": [_pick(container, _CONTAINER) for container in spec["containers"]],
        },
        "status": _pick(document["status"], _STATUS),
    }


def _pick(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: fields[name] for name in names if name in fields}
