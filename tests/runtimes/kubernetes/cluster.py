"""Kubernetes' API in memory, behind real HTTP, in a thread; the test is its scheduler and kubelet."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kmock
import kubernetes_validate
import yaml
from kubernetes.client import ApiClient, Configuration, CoreV1Api

NAMESPACE = "qlora-retrain"
VERBS = {"POST": "create", "DELETE": "delete", "PATCH": "patch"}


class Emulator(kmock.KubernetesEmulator):  # type: ignore[misc]
    """kmock's API, and what it leaves out: statuses of new pods, a grace period, logs, quotas, and who may do what."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.verbs: set[tuple[str, str]] = set()
        self.logs: dict[str, str] = {}
        self.forced: list[str] = []
        self.graceful = False
        self.logs_fail = False
        self.refuses: dict[str, tuple[int, str]] = {}  # HTTP method -> (status, message)

    async def _handle(self, request: Any) -> Any:
        resource = request.resource.plural + (f"/{request.subresource}" if request.subresource else "")
        method = request.method.value.upper() if hasattr(request.method, "value") else str(request.method).upper()
        watching = "watch" in (request.params or {})
        verb = VERBS.get(method) or ("get" if request.name else "watch" if watching else "list")
        self.verbs.add((verb, resource))
        if method in self.refuses:
            status, message = self.refuses[method]
            return await self._render_error(kmock.KubernetesError(status=status, reason="Refused", message=message))
        if resource == "pods/log" and self.logs_fail:
            return await self._render_error(kmock.KubernetesError(status=500, reason="Refused", message="no route"))
        if resource == "pods/log":
            import aiohttp.web

            return aiohttp.web.Response(text=self.logs.get(request.name, ""))
        if method == "POST" and resource == "pods":
            kubernetes_validate.validate(request.data, "1.32", strict=True)  # as the API server would refuse it
            request.data["metadata"]["uid"] = uuid.uuid4().hex
            request.data["status"] = {"phase": "Pending"}
            if self.graceful:
                request.data["metadata"]["finalizers"] = ["kubelet"]
        if method == "DELETE" and (request.params or {}).get("gracePeriodSeconds") == "0":  # the kubelet is not asked
            self.forced.append(request.name)
            self.objects[request.resource, request.namespace, request.name].patch({"metadata": {"finalizers": []}})
        return await super()._handle(request)


class Cluster:
    """The API, its address as a kubeconfig, and what happens on its nodes."""

    def __init__(self, folder: Path) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        cluster = {"name": "c", "cluster": {"server": self.url}}
        user = {"name": "u", "user": {"token": "canary-kubeconfig-51ab"}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        document = {"clusters": [cluster], "users": [user], "contexts": [context], "current-context": "x"}
        self.kubeconfig.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **document}))
        configuration = Configuration()
        configuration.host = self.url
        self.api = CoreV1Api(ApiClient(configuration))

    async def _serve(self) -> None:
        async with Emulator() as self.emulator, kmock.Server(self.emulator) as server:
            self.emulator.resources["v1/pods"] = {}
            self.emulator.resources["v1/events"] = {}
            self.url = str(server.url).rstrip("/")
            self._ready.set()
            await self._stop.wait()

    def close(self) -> None:
        self.api.api_client.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    def pods(self) -> list[dict[str, Any]]:
        answer = self.api.list_namespaced_pod(NAMESPACE, _preload_content=False)
        return list(json.loads(answer.data)["items"])

    def created(self) -> int:
        """How many pods were ever made."""
        seen = [r for r in self.emulator if str(r.method).upper().endswith("POST")]
        return len(seen)

    def pod(self) -> dict[str, Any]:
        (found,) = self.pods()
        return found

    def set(self, name: str, **status: Any) -> None:
        self.api.patch_namespaced_pod(name, NAMESPACE, {"status": status})

    def ends(self, code: int, *, because: str = "", said: str = "", **status: Any) -> None:
        """The only pod's container ends."""
        reason = because or ("Error" if code else "Completed")
        state = {"terminated": {"exitCode": code, "reason": reason, "message": said or None}}
        self._container(state, phase="Failed" if code else "Succeeded", **status)

    def waits(self, reason: str, message: str) -> None:
        """The only pod's container cannot be started."""
        self._container({"waiting": {"reason": reason, "message": message}}, phase="Pending")

    def runs(self) -> None:
        """The only pod's container begins."""
        self._container({"running": {"startedAt": "2026-01-31T03:00:00Z"}}, phase="Running")

    def falls_silent(self, minutes: float) -> None:
        """The only pod's node was last heard of so long ago, while the container ran."""
        self.runs()
        condition = {"type": "Ready", "status": "False", "lastTransitionTime": ago(minutes)}
        self.set(self.pod()["metadata"]["name"], conditions=[condition])

    def wants_gone(self, minutes: float) -> None:
        """Somebody deleted the only pod, whose grace was over so long ago, and its kubelet does not say that it is."""
        self.runs()
        name = self.pod()["metadata"]["name"]
        body = {"metadata": {"finalizers": ["kubelet"], "deletionTimestamp": ago(minutes)}}
        self.api.patch_namespaced_pod(name, NAMESPACE, body)

    def _container(self, state: dict[str, Any], **status: Any) -> None:
        image = {"image": "i", "imageID": "i", "ready": False, "restartCount": 0}
        name = self.pod()["metadata"]["name"]
        self.set(name, containerStatuses=[{"name": "base", "state": state, **image}], **status)

    def does_the_work(self, *, because: str = "") -> int:
        """Be the kubelet of the only pod: run its command line with its variables; report its end and why."""
        container = self.pod()["spec"]["containers"][0]
        variables = {
            v["name"]: v["value"] for v in container["env"] if not v["value"].startswith(("/workspace", "/tmp"))
        }
        self.runs()
        done = subprocess.run(
            [sys.executable, *container["args"][1:]],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
        self.emulator.logs[self.pod()["metadata"]["name"]] = done.stdout + done.stderr
        said = "\n".join((done.stdout + done.stderr).splitlines()[-5:]) if done.returncode else ""
        self.ends(done.returncode, because=because, said=said)
        return done.returncode

    def removes(self) -> None:
        """The kubelet lets go of the pods that are being deleted."""
        for pod in self.pods():
            if pod["metadata"].get("deletionTimestamp"):
                body = {"metadata": {"finalizers": []}}
                self.api.patch_namespaced_pod(pod["metadata"]["name"], NAMESPACE, body)


def ago(minutes: float) -> str:
    return (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat()


def running(folder: Path) -> Iterator[Cluster]:
    made = Cluster(folder)
    yield made
    made.close()
