"""Versions of a few bytes in any store, without a run; and processes that are forked, to be killed or to be others."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from qlora_retrain.core import hashing
from qlora_retrain.storage import registry
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

LINE = "intents"
REFERENCE = f"{LINE}@production"
SHARED = {"README.md": b"# intents\n", "recipe.json": b"{}", "model/config.json": b'{"hidden_size": 8}'}
WEIGHTS, ADAPTER = "model/model.safetensors", "adapter/adapter_model.safetensors"
EXPORT = "model/exports/gguf-q8_0/model-q8_0.gguf"
CHILD_SECONDS = 300


def files_of(number: int, size_bytes: int = 900) -> dict[str, bytes]:
    """Files of which three differ from number to number; `SHARED` are in every one."""
    own = {path: f"{number} {path} ".encode() for path in (WEIGHTS, ADAPTER, EXPORT)}
    return {**SHARED, **{path: (text * size_bytes)[:size_bytes] for path, text in own.items()}}


def listed(files: Mapping[str, bytes]) -> tuple[File, ...]:
    return tuple(File(path=p, size_bytes=len(d), sha256=hashing.sha256_bytes(d)) for p, d in sorted(files.items()))


def release_of(files: tuple[File, ...], number: int) -> Release:
    content = hashing.content_hash((f.path, f.sha256) for f in files if f.path.startswith(("adapter/", "model/")))
    stamp = f"2026010{number}T000000Z"
    return Release(
        line=LINE,
        version=f"{stamp}-{content[:12]}",
        content_hash=content,
        created_at=stamp,
        files=files,
        adapter_key="a" * 64,
        judgement="b" * 64,
        keys={},
        base={},
        numbers={},
        provenance={},
    )


def publish(store: Store, number: int, files: Mapping[str, bytes] | None = None) -> Release:
    """Write a version and let `production` name it."""
    files = files_of(number) if files is None else files
    release = release_of(listed(files), number)
    for path, data in files.items():
        store.write_if_absent(f"{registry.version_folder(LINE, release.version)}/{path}", data)
    release = registry.complete_version(store, release)
    registry.move_alias(store, LINE, "production", release, reason="a test", is_verified=True)
    return release


def pulled_files(destination: Path) -> dict[str, bytes]:
    """The files of the current version, without the manifest and the record."""
    folder = (destination / "current").resolve()
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {path: data for path, data in files.items() if path not in ("manifest.json", "_pulled.json")}


def in_child(function: Callable[[], object]) -> int:
    """Call a function in a process of its own, which ends without any clean-up; return its exit code or signal."""
    child = os.fork()
    if child == 0:
        signal.alarm(CHILD_SECONDS)
        code = 1
        try:
            function()
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
