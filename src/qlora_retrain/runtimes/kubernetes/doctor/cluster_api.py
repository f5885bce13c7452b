"""Calls to the Kubernetes API that the doctor makes: each returns its answer, also where it is a refusal.

Environment: inside a pod its service account's token; elsewhere the kubeconfig that `KUBECONFIG` names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_retrain.runtimes.kubernetes.findings import Finding, fault, unknown

Document = dict[str, Any]
_TIMEOUT_SECONDS = 15
_PAGE_SIZE = 500
_MAX_PAGES = 40
APPLY = "kubectl apply -k manifests/doctor"


class Unreachable(Exception):
    """The API server does not answer, or there are no credentials for it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of the API server.

    Attributes:
        status: The HTTP status.
        document: Its body; empty where it was no JSON object.
        headers: Its headers, by their names in small letters.
    """

    status: int
    document: Document
    headers: Mapping[str, str]

    @property
    def is_success(self) -> bool:
        """Whether the server did what it was asked to do."""
        return 200 <= self.status < 300

    @property
    def message(self) -> str:
        """The server's reason for a refusal."""
        return str(self.document.get("message") or f"HTTP {self.status}")


@dataclass(frozen=True, slots=True)
class ClusterApi:
    """The API as one account sees it.

    Attributes:
        client: An ApiClient of the package `kubernetes`.
    """

    client: Any

    @classmethod
    def connect(cls) -> ClusterApi:
        """Connect with the credentials of this pod or of a kubeconfig.

        Raises:
            Unreachable: If there are none.
        """
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException

        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config()
            else:
                config.load_kube_config()
        except (ConfigException, OSError) as error:
            raise Unreachable(f"no credentials for a cluster: {error}") from error
        return cls(client.ApiClient())

    def get(self, path: str, **query: str | int) -> Answer:
        """Read what is at a path."""
        return self._call("GET", path, None, query)

    def post(self, path: str, body: Document, **query: str | int) -> Answer:
        """Create what the body says."""
        return self._call("POST", path, body, query)

    def items(self, path: str) -> tuple[Answer, list[Document]]:
        """List everything at a path, page by page; return the last answer too, which may be a refusal."""
        items: list[Document] = []
        token = ""
        for _ in range(_MAX_PAGES):
            answer = self.get(path, limit=_PAGE_SIZE, **({"continue": token} if token else {}))
            items += answer.document.get("items") or []
            token = (answer.document.get("metadata") or {}).get("continue") or ""
            if not answer.is_success or not token:
                break
        return answer, items

    def _call(self, method: str, path: str, body: Document | None, query: Mapping[str, str | int]) -> Answer:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        options = {"auth_settings": ["BearerToken"], "_preload_content": False, "_request_timeout": _TIMEOUT_SECONDS}
        try:
            response = self.client.call_api(
                path, method, query_params=list(query.items()), header_params=headers, body=body, **options
            )
            return Answer(response.status, _parse(response.data), _lower(response.headers))
        except ApiException as error:
            if not error.status:
                raise Unreachable(f"the Kubernetes API does not answer: {error.reason}") from error
            return Answer(error.status, _parse(error.body), _lower(error.headers or {}))
        except (HTTPError, OSError) as error:
            raise Unreachable(f"the Kubernetes API does not answer: {error}") from error


def refusal(check: str, subject: str, answer: Answer) -> Iterator[Finding]:
    """Yield what an answer other than a success means: the doctor may not look, or the cluster fails."""
    if answer.status in (401, 403):
        yield unknown(check, f"{subject}: the doctor may not look at it: {answer.message}", APPLY)
    elif not answer.is_success:
        yield fault(check, subject, "an answer of the API", answer.message, "ask who runs the cluster")


def _parse(body: bytes | str | None) -> Document:
    try:
        document = json.loads(body or "{}")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
