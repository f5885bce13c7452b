"""Kubernetes' API in memory, behind real HTTP, in a thread; the test is its scheduler and kubelet."""

from __future__ import annotations

import asyncio
import functools
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

import aiohttp.test_utils
import aiohttp.web
import kmock
import kubernetes_validate
import yaml
from kubernetes.client import ApiClient, Configuration, CoreV1Api

from tests.runtimes.kubernetes.https import secured

NAMESPACE = "qlora-retrain"
VERBS = {"POST": "create", "DELETE": "delete", "PATCH": "patch"}
THE_TEST = "the-test"  # how it calls itself, so that what it does is not taken for the operator's


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
        if request.headers.get("User-Agent") != THE_TEST:
            self.verbs.add((verb, resource))
        if method in self.refuses:
            status, message = self.refuses[method]
            return await self._render_error(kmock.KubernetesError(status=status, reason="Refused", message=message))
        if resource == "pods/log" and self.logs_fail:
            return await self._render_error(kmock.KubernetesError(status=500, reason="Refused", message="no route"))
        if resource == "pods/log":
            pod = self.objects[kmock.resource("v1/pods"), request.namespace, request.name]
            if "containerStatuses" not in pod["status"]:
                message = f'container "base" in pod "{request.name}" is waiting to start'
                return await self._render_error(kmock.KubernetesError(status=400, reason="BadRequest", message=message))
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

    async def _serve_list(self, request: Any) -> Any:
        answer = await super()._serve_list(request)
        selector = (request.params or {}).get("fieldSelector", "")
        wanted = dict(part.split("=") for part in selector.split(",") if part)
        found = [i for i in answer["items"] if all(field(i, path) == value for path, value in wanted.items())]
        return {**answer, "items": found}


class Cluster:
    """The API, its address as a kubeconfig, and what happens on its nodes."""

    def __init__(self, folder: Path, *, secure: bool = False) -> None:
        self.kubeconfig, self.authority = folder / "kubeconfig", folder / "ca.crt"
        self._server = secured(self.authority) if secure else aiohttp.test_utils.RawTestServer
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
        configuration.host, configuration.ssl_ca_cert = self.url, str(self.authority)
        self.api = CoreV1Api(ApiClient(configuration))
        self.api.api_client.user_agent = THE_TEST

    async def _serve(self) -> None:
        async with Emulator() as self.emulator, kmock.Server(self.emulator, server_cls=self._server) as server:
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
        seen = [r for r in self.emulator if r.action == kmock.action.CREATE and r.resource.plural == "pods"]
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

    def warns(self, reason: str, message: str, *, minutes: float = 0, uid: str = "") -> None:
        """An event of the only pod, or of another of its name, so long ago."""
        metadata = self.pod()["metadata"]
        involved = {"kind": "Pod", "name": metadata["name"], "namespace": NAMESPACE, "uid": uid or metadata["uid"]}
        body = {
            "metadata": {"name": uuid.uuid4().hex, "namespace": NAMESPACE},
            "involvedObject": involved,
            "type": "Warning",
            "reason": reason,
            "message": message,
            "lastTimestamp": ago(minutes),
        }
        self.api.create_namespaced_event(NAMESPACE, body)

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


def field(item: dict[str, Any], path: str) -> Any:
    """What a field selector speaks of."""
    return functools.reduce(lambda found, name: found.get(name) or {}, path.split("."), item)


def ago(minutes: float) -> str:
    return (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat()


def running(folder: Path, *, secure: bool = False) -> Iterator[Cluster]:
    made = Cluster(folder, secure=secure)
    yield made
    made.close()
