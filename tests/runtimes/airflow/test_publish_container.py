"""A move in a container: what the engine is asked for is the container of `publish`, with another command."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import docker
import pytest

from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.storage import open_store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported


class Engine(docker.APIClient):
    """An engine that is not there: what needs no answer is docker's own client, and a container ends with 12."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", version="1.41")
        self.created: dict[str, Any] = {}
        self.removed: list[str] = []

    def inspect_container(self, container: str) -> dict[str, Any]:
        if not self.created:
            raise docker.errors.NotFound("no such container")
        return {"Id": "1", "State": {"Running": False}}

    def inspect_image(self, image: str) -> dict[str, Any]:
        return {"Id": image}

    def create_container(self, image: str, **options: Any) -> dict[str, str]:
        self.created = {"image": image, **options}
        return {"Id": "1"}

    def start(self, container: str) -> None:
        assert container == "1"

    def logs(self, container: str, **_: Any) -> Any:
        yield b"unsigned\nqlora-retrain: line tickets has no version 1\n"

    def wait(self, container: str) -> dict[str, int]:
        return {"StatusCode": 12}

    def remove_container(self, container: str, **_: Any) -> None:
        self.removed.append(container)


def test_the_container_writes_the_lines_models_alone_and_its_words_are_the_reason(
    root_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_retrain.runtimes.airflow.publish_container import DockerCommand

    monkeypatch.setenv("QLORA_RETRAIN_ROOT", root_uri)
    open_store(root_uri).write_if_absent("x", b"")
    store = tmp_path / "store"
    for path in (store, *store.rglob("*")):
        os.chown(path, 10001, 10001)
    engine = Engine()
    monkeypatch.setattr(DockerCommand, "cli", engine)
    runtime = RuntimeConfig(kind="docker", light_image="light:7", memory_gib=3)
    command = DockerCommand(task_id="publish", step="publish", line="tickets", runtime=runtime)
    ending = command.run_command(["promote", "tickets", "--reason=$(x)"], "20260131T030000Z-0123", timedelta(hours=1))

    assert (ending.code, ending.reason) == (12, "line tickets has no version 1")
    assert engine.created["image"] == "light:7"
    assert engine.created["name"] == "qlora-retrain-move-20260131T030000Z-0123"
    assert engine.created["command"] == ["python", "-m", "qlora_retrain.cli", "promote", "tickets", "--reason=$(x)"]
    assert engine.created["user"] == "10001:10001"
    host = engine.created["host_config"]
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["Memory"]) == (True, ["ALL"], 3 * 2**30)
    binds = {mount["Target"]: mount["ReadOnly"] for mount in host["Mounts"] if mount["Type"] == "bind"}
    writable = {path for path, read_only in binds.items() if not read_only}
    assert binds[str(store)]
    assert {path for path in writable if not path.endswith("lock")} == {f"{store}/models/tickets"}
    assert engine.removed == ["1"]
