"""Commits of the Hugging Face Hub: their files are pinned by sha256, and the cache is checked against these pins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_retrain.core.errors import IntegrityError, TryAgain, UsageError
from qlora_retrain.storage import cache, planner_memory, sources
from tests import hub_server
from tests.hub_server import COMMIT, URI, HubServer

BASE = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"model": {"vocab": {"auto_map": 7}}}',
    "model.safetensors": b"weights",
    "README.md": b"# A model",
    "pytorch_model.bin": b"a pickle",
    "onnx/model.onnx": b"another form",
    "modeling.py": b"import os",
    "weird [1]*.json": b"{}",
}
MODEL_FILES = {"config.json", "tokenizer.json", "model.safetensors", "weird [1]*.json"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for path, data in BASE.items():
        (tmp_path / "repository" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / path).write_bytes(data)
    with hub_server.serve(tmp_path / "repository", tmp_path / "state", monkeypatch) as server:
        yield server


def pin() -> sources.PinnedSource:
    return sources.pin("base_model", URI, ["**"])


def test_every_file_of_a_commit_is_pinned_and_what_is_no_model_is_named(hub: HubServer) -> None:
    pinned = pin()
    assert {f.path: f.pin for f in pinned.files} == {
        "*": f"commit:{COMMIT}", **{path: f"sha256:{hashlib.sha256(BASE[path]).hexdigest()}" for path in MODEL_FILES},
    }  # fmt: skip
    assert pinned.left_out == ("README.md", "modeling.py", "onnx/model.onnx", "pytorch_model.bin")
    # The weights' hash is the Hub's: they are not downloaded for it.
    assert not [path for path in hub.requests if path.endswith(("model.safetensors", ".bin", ".py"))]


def test_what_is_fetched_is_what_was_pinned(hub: HubServer, tmp_path: Path) -> None:
    pinned = pin()
    (tmp_path / "out").mkdir()
    sources.fetch(pinned, tmp_path / "out")
    fetched = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    assert fetched == {path: BASE[path] for path in MODEL_FILES}

    (hub.folder / "model.safetensors").write_bytes(b"WEIGHTS")
    (tmp_path / "again").mkdir()
    with pytest.raises(IntegrityError, match=r"model\.safetensors is not what the plan pinned"):
        sources.fetch(pinned, tmp_path / "again")


def test_the_key_of_a_commit_is_the_same_whether_its_files_could_be_listed(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listed = pin()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "empty"))
    hub_server.go_offline(monkeypatch)
    unlisted = pin()
    assert (listed.is_listed, unlisted.is_listed) == (True, False)
    for only in ((), ("config.json",)):
        assert listed.subset(only).key() == unlisted.subset(only).key()


def test_a_cached_commit_is_checked_against_the_plan_and_not_against_a_record_beside_it(hub: HubServer) -> None:
    pinned = pin()

    def fetch() -> Path:
        return cache.fetch("base_model", pinned.key(), lambda folder: sources.fetch(pinned, folder), pinned.as_files())

    folder = fetch()
    weights = folder / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"poison!")
    # A record of the poisoned files, as an earlier release kept one and believed it.
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()} {p.name}\n" for p in sorted(folder.iterdir())]
    folder.with_name(f"{folder.name}.sha256").write_text("".join(lines))
    assert (fetch() / "model.safetensors").read_bytes() == b"weights"


def test_offline_the_planner_remembers_a_commit_and_the_cache_serves_it(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = pin()
    cache.fetch("base_model", online.key(), lambda folder: sources.fetch(online, folder), online.as_files())
    hub_server.go_offline(monkeypatch)
    offline = pin()
    assert offline == online
    folder = cache.fetch("base_model", offline.key(), forbidden, offline.as_files())
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def forbidden(_: Path) -> None:
    raise AssertionError("downloaded")


def test_a_second_plan_asks_the_hub_for_nothing(hub: HubServer) -> None:
    first = pin()
    hub.requests.clear()
    assert pin() == first
    assert hub.requests == []
    # Files that were not wanted before are hashed now, and both are remembered.
    data = sources.pin("raw_data", URI, ["README.md"])
    assert [f.path for f in data.content] == ["README.md"]
    assert hub.requests != []


def test_a_damaged_memory_is_asked_for_again(hub: HubServer, tmp_path: Path) -> None:
    first = pin()
    memory = planner_memory.place("commit-files", URI)
    assert memory is not None
    assert memory.is_relative_to(tmp_path / "state")
    for damage in ("{", "[]", '{"config.json": 1}', ""):
        memory.write_text(damage)
        assert pin() == first


def test_offline_a_commit_is_pinned_and_fetched_from_the_clients_own_cache(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import snapshot_download

    online = pin()
    snapshot_download("owner/model", revision=COMMIT)
    hub_server.go_offline(monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "empty"))
    offline = pin()
    assert offline == online
    (tmp_path / "out").mkdir()
    sources.fetch(offline, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"weights"


def test_where_nobody_can_tell_the_step_asks_and_never_believes_the_cache(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as offline:
        hub_server.go_offline(offline)
        pinned = pin()
        (tmp_path / "out").mkdir()
        with pytest.raises(UsageError, match="cannot be reached"):
            sources.list_commit("base_model", pinned)
        with pytest.raises(UsageError, match="cannot be reached"):
            sources.fetch(pinned, tmp_path / "out")
    assert not pinned.is_listed
    assert sources.list_commit("base_model", pinned).as_files() == pin().as_files()

    hub.server_close()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "empty"))
    with pytest.raises(TryAgain, match="cannot be reached"):
        sources.list_commit("base_model", pinned)


@pytest.mark.parametrize("status", [401, 403])
def test_a_planner_without_access_leaves_the_commit_to_the_steps_that_have_it(hub: HubServer, status: int) -> None:
    hub.status = status
    pinned = pin()
    assert [f.pin for f in pinned.files] == [f"commit:{COMMIT}"]
    with pytest.raises(UsageError, match="cannot be reached"):
        sources.list_commit("base_model", pinned)
    hub.status = 0
    assert sources.list_commit("base_model", pinned).as_files() == pin().as_files()


@pytest.mark.parametrize("token", ["hf_secret\x0b", "hf_secret\u20ac"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{token}x")
    with pytest.raises(UsageError, match="HF_TOKEN or HF_ENDPOINT cannot be sent") as refused:
        pin()
    assert "hf_secret" not in str(refused.value)


@pytest.mark.parametrize(("status", "error"), [(410, UsageError), (503, TryAgain)])
def test_an_error_of_the_hub_has_no_query_of_an_address(hub: HubServer, status: int, error: type[Exception]) -> None:
    hub.status = 503
    pinned = pin()
    hub.status = status
    with pytest.raises(error, match=r"revision/\w+\?\*\*\*"):
        sources.list_commit("base_model", pinned)


def test_no_such_commit_is_refused_when_the_plan_is_made(hub: HubServer) -> None:
    with pytest.raises(UsageError, match="cannot be downloaded"):
        sources.pin("base_model", f"hf://owner/model@{COMMIT[::-1]}", ["**"])


@pytest.mark.parametrize("path", ["config.json", "generation_config.json", "sub/processor_config.json"])
def test_a_commit_that_asks_for_code_is_refused_when_the_plan_is_made(hub: HubServer, path: str) -> None:
    (hub.folder / path).parent.mkdir(exist_ok=True)
    (hub.folder / path).write_text(json.dumps({"text_config": {"auto_map": {"AutoConfig": "x.Y"}}}))
    with pytest.raises(IntegrityError, match="auto_map"):
        pin()
    # Data is never loaded as a model.
    sources.pin("raw_data", URI, ["**"])


def test_a_commit_with_pickles_alone_is_refused_with_the_way_to_convert(hub: HubServer) -> None:
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        pin()
