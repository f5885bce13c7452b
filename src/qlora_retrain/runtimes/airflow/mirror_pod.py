"""A mirror in a pod, with a service account, a token and a way out of its own; see `mirror_command.py`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from qlora_retrain.runtimes.airflow.publish_pod import KubernetesCommand
from qlora_retrain.runtimes.kubernetes import mirror_spec
from qlora_retrain.storage.keys import MIRROR


class KubernetesMirror(KubernetesCommand):
    """A pod of the image of `publish`.

    Args:
        secret: The Kubernetes secret with the token.
        destination: The mirror.
    """

    command = MIRROR
    label = mirror_spec.MIRROR_LABEL

    def __init__(self, *, secret: str, destination: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.suffix = destination
        self._secret = secret

    def prepare_command(self, arguments: list[str], run_id: str, timeout: timedelta) -> None:
        """Fill in what the pod has otherwise than that of `publish`, and what depends on the run."""
        attributes = mirror_spec.pod_attributes(self.line, self.profile, self.runtime, self._secret)
        for name, value in attributes.items():
            setattr(self, name, value)
        super().prepare_command(arguments, run_id, timeout)
