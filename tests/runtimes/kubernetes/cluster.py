"""Kubernetes' API in memory, behind real HTTP, in a thread; the test plays the scheduler and the kubelet."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp.test_utils
import aiohttp.web
import kmock
import kubernetes_validate
import yaml
from kubernetes.client import ApiClient, Configuration, CoreV1Api

from tests.runtimes.kubernetes.https_server import https_server_factory

NAMESPACE = "qlora-retrain"
VERBS = {"POST": "create", "DELETE": "delete", "PATCH": "patch"}
TEST_USER_AGENT = "the-test"  # tells the test's own requests from the operator's


class Emulator(kmock.KubernetesEmulator):  # type: ignore[misc]
    """kmock's API with what it leaves out: statuses of new pods, grace periods, logs, and refused requests.

    Attributes:
        used_verbs: (verb, resource) of every request that the operator made.
        counts: How often it made each of them.
        logs: The log of each pod, by name.
        force_deleted: The pods that were deleted with a grace period of 0.
        waits_for_kubelet: New pods outlive their deletion until `finish_deletions`, as a pod does that saves its work.
        logs_fail: Answer 500 to requests for logs.
        logs_hang: Answer requests for logs never, as where a kubelet is silent.
        rejections: HTTP method -> (status, message) to answer instead of doing it.
        rejection_counts: HTTP method -> how many requests are still rejected; without an entry, all are.
    """

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.used_verbs: set[tuple[str, str]] = set()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.logs: dict[str, str] = {}
        self.force_deleted: list[str] = []
        self.waits_for_kubelet = False
        self.logs_fail = self.logs_hang = False
        self.rejections: dict[str, tuple[int, str]] = {}
        self.rejection_counts: dict[str, int] = {}

    async def _handle(self, request: Any) -> Any:
        resource = request.resource.plural + (f"/{request.subresource}" if request.subresource else "")
        method = request.method.value.upper() if hasattr(request.method, "value") else str(request.method).upper()
        watching = "watch" in (request.params or {})
        verb = VERBS.get(method) or ("get" if request.name else "watch" if watching else "list")
        if request.headers.get("User-Agent") != TEST_USER_AGENT:
            self.used_verbs.add((verb, resource))
            self.counts[verb, resource] += 1

        if method in self.rejections and self.rejection_counts.get(method, 1) > 0:
            status, message = self.rejections[method]
            if method in self.rejection_counts:
                self.rejection_counts[method] -= 1
            return await self._render_error(kmock.KubernetesError(status=status, reason="Refused", message=message))
        if resource == "pods/log" and self.logs_fail:
            return await self._render_error(kmock.KubernetesError(status=500, reason="Refused", message="no route"))

        if resource == "pods/log" and self.logs_hang:
            await asyncio.Event().wait()
        since_seconds = int((request.params or {}).get("sinceSeconds", "1"))
        if resource == "pods/log" and since_seconds < 1:
            message = f"sinceSeconds: Invalid value: {since_seconds}: must be greater than 0"
            return await self._render_error(kmock.KubernetesError(status=422, reason="Invalid", message=message))

        # The API server answers 400 for the log of a container that has not started.
        if resource == "pods/log":
            pod = self.objects[kmock.resource("v1/pods"), request.namespace, request.name]
            if "status" not in pod:
                message = f'pods "{request.name}" not found'
                return await self._render_error(kmock.KubernetesError(status=404, reason="NotFound", message=message))
            if "containerStatuses" not in pod["status"]:
                message = f'container "base" in pod "{request.name}" is waiting to start'
                return await self._render_error(kmock.KubernetesError(status=400, reason="BadRequest", message=message))
            return aiohttp.web.Response(text=self.logs.get(request.name, ""))

        if method == "POST" and resource == "pods":
            kubernetes_validate.validate(request.data, "1.32", strict=True)  # what the API server would refuse fails
            request.data["metadata"]["uid"] = uuid.uuid4().hex
            request.data["status"] = {"phase": "Pending"}
            if self.waits_for_kubelet:
                request.data["metadata"]["finalizers"] = ["kubelet"]

        # A forced deletion does not wait for the kubelet.
        if method == "DELETE" and (request.params or {}).get("gracePeriodSeconds") == "0":
            self.force_deleted.append(request.name)
            self.objects[request.resource, request.namespace, request.name].patch({"metadata": {"finalizers": []}})
        return await super()._handle(request)

    async def _serve_list(self, request: Any) -> Any:
        # kmock ignores field selectors.
        response = await super()._serve_list(request)
        selector = (request.params or {}).get("fieldSelector", "")
        expected = dict(part.split("=") for part in selector.split(",") if part)
        selected = [
            i for i in response["items"] if all(read_field(i, path) == value for path, value in expected.items())
        ]
        return {**response, "items": selected}


class FakeCluster:
    """The API, a kubeconfig with its address, and methods for what happens on its nodes.

    The methods that name no pod act on the only pod that there is.
    """

    def __init__(self, folder: Path, *, secure: bool = False, emulator_class: type[Emulator] = Emulator) -> None:
        self._emulator_class = emulator_class
        self.kubeconfig, self.authority = folder / "kubeconfig", folder / "ca.crt"
        self._server = https_server_factory(self.authority) if secure else aiohttp.test_utils.RawTestServer
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(90)

        # The token is a canary: tests search for it in every place that a person can read.
        cluster = {"name": "c", "cluster": {"server": self.url}}
        user = {"name": "u", "user": {"token": "canary-kubeconfig-51ab"}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        document = {"clusters": [cluster], "users": [user], "contexts": [context], "current-context": "x"}
        self.kubeconfig.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **document}))

        configuration = Configuration()
        configuration.host, configuration.ssl_ca_cert = self.url, str(self.authority)
        self.api = CoreV1Api(ApiClient(configuration))
        self.api.api_client.user_agent = TEST_USER_AGENT

    async def _serve(self) -> None:
        async with (
            self._emulator_class() as self.emulator,
            kmock.Server(self.emulator, server_cls=self._server) as server,
        ):
            self.emulator.resources["v1/pods"] = {}
            self.emulator.resources["v1/events"] = {}
            self.url = str(server.url).rstrip("/")
            self._ready.set()
            await self._stop.wait()

    def close(self) -> None:
        self.api.api_client.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(90)
        self._loop.close()

    def pods(self) -> list[dict[str, Any]]:
        response = self.api.list_namespaced_pod(NAMESPACE, _preload_content=False)
        return list(json.loads(response.data)["items"])

    def created_count(self) -> int:
        """Count the pods that were ever created, deleted ones too."""
        requests = [r for r in self.emulator if r.action == kmock.action.CREATE and r.resource.plural == "pods"]
        return len(requests)

    def pod(self) -> dict[str, Any]:
        """Return the only pod."""
        (pod,) = self.pods()
        return pod

    def set_status(self, name: str, **status: Any) -> None:
        self.api.patch_namespaced_pod(name, NAMESPACE, {"status": status})

    def end_container(
        self, exit_code: int, *, container_reason: str = "", termination_message: str = "", **status: Any
    ) -> None:
        """End the pod's container; `status` goes into the pod's own status."""
        reason = container_reason or ("Error" if exit_code else "Completed")
        state = {"terminated": {"exitCode": exit_code, "reason": reason, "message": termination_message or None}}
        self._container(state, phase="Failed" if exit_code else "Succeeded", **status)

    def set_waiting(self, reason: str, message: str) -> None:
        """Show that the pod's container cannot be started."""
        self._container({"waiting": {"reason": reason, "message": message}}, phase="Pending")

    def add_event(
        self, reason: str, message: str, *, minutes: float = 0, uid: str = "", event_type: str = "Warning"
    ) -> None:
        """Record an event of the pod, so many minutes ago; `uid` makes it one of an earlier pod of its name."""
        metadata = self.pod()["metadata"]
        involved = {"kind": "Pod", "name": metadata["name"], "namespace": NAMESPACE, "uid": uid or metadata["uid"]}
        body = {
            "metadata": {"name": uuid.uuid4().hex, "namespace": NAMESPACE},
            "involvedObject": involved,
            "type": event_type,
            "reason": reason,
            "message": message,
            "lastTimestamp": ago(minutes),
        }
        self.api.create_namespaced_event(NAMESPACE, body)

    def gate(self, name: str, hours: float) -> None:
        """Hold a pod back that was created so many hours ago, as Kueue does."""
        condition = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}
        body = {
            "metadata": {"creationTimestamp": ago(hours * 60)},
            "spec": {"schedulingGates": [{"name": "kueue.x-k8s.io/admission"}]},
            "status": {"conditions": [condition]},
        }
        self.api.patch_namespaced_pod(name, NAMESPACE, body)

    def admit(self, name: str) -> None:
        """Let the scheduler look for a node for the pod."""
        self.api.patch_namespaced_pod(name, NAMESPACE, {"spec": {"schedulingGates": None}})

    def start_container(self) -> None:
        """Start the pod's container."""
        self._container({"running": {"startedAt": "2026-01-31T03:00:00Z"}}, phase="Running")

    def lose_node(self, minutes: float) -> None:
        """Let the pod's node fall silent so many minutes ago, while the container ran."""
        self.start_container()
        condition = {"type": "Ready", "status": "False", "lastTransitionTime": ago(minutes)}
        self.set_status(self.pod()["metadata"]["name"], conditions=[condition])

    def overstay_deletion(self, minutes: float) -> None:
        """Delete the pod so that its grace period ended so many minutes ago, and no kubelet confirms its end."""
        self.start_container()
        name = self.pod()["metadata"]["name"]
        body = {"metadata": {"finalizers": ["kubelet"], "deletionTimestamp": ago(minutes)}}
        self.api.patch_namespaced_pod(name, NAMESPACE, body)

    def _container(self, state: dict[str, Any], **status: Any) -> None:
        image = {"image": "i", "imageID": "i", "ready": False, "restartCount": 0}
        name = self.pod()["metadata"]["name"]
        self.set_status(name, containerStatuses=[{"name": "base", "state": state, **image}], **status)

    def run_step(self, *, container_reason: str = "") -> int:
        """Run the pod's command line with its variables, as its kubelet would; set the pod's log and status.

        Returns:
            The exit code of the step.
        """
        container = self.pod()["spec"]["containers"][0]
        # The variables that name the pod's own folders have no meaning on this machine.
        variables = {
            v["name"]: v["value"] for v in container["env"] if not v["value"].startswith(("/workspace", "/tmp"))
        }
        self.start_container()
        completed = subprocess.run(
            [sys.executable, *container["args"][1:]],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

        # FallbackToLogsOnError: this machine has no termination log, so the message is the end of the log.
        self.emulator.logs[self.pod()["metadata"]["name"]] = completed.stdout
        termination_message = "\n".join(completed.stdout.splitlines()[-5:]) if completed.returncode else ""
        self.end_container(
            completed.returncode, container_reason=container_reason, termination_message=termination_message
        )
        return completed.returncode

    def finish_deletions(self) -> None:
        """Confirm the end of the pods that are being deleted, as their kubelet does."""
        for pod in self.pods():
            if pod["metadata"].get("deletionTimestamp"):
                body = {"metadata": {"finalizers": []}}
                self.api.patch_namespaced_pod(pod["metadata"]["name"], NAMESPACE, body)


def read_field(item: dict[str, Any], path: str) -> Any:
    """Return the value at a field selector's path, e.g. `involvedObject.uid`."""
    return functools.reduce(lambda value, name: value.get(name) or {}, path.split("."), item)


def ago(minutes: float) -> str:
    return (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat()


def running_cluster(folder: Path, *, secure: bool = False) -> Iterator[FakeCluster]:
    cluster = FakeCluster(folder, secure=secure)
    yield cluster
    cluster.close()
