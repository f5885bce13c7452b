"""A store with two plans, what they named, and what died beside it; small enough to be collected hundreds of times."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core import hashing
from qlora_retrain.pipeline import make_plan
from qlora_retrain.pipeline.plan import Plan, utc_stamp
from qlora_retrain.storage import registry
from qlora_retrain.storage.artifact import manifest_path
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store
from tests.published import publish_version

# Files of tests are written now, so collections are made later.
NOW = datetime.now(UTC)
LATER = NOW + timedelta(days=45)
LINE = "intents"
KEEP = "publish.keep={versions: 1, days: 20}"


class Killed(BaseException):
    """The process ends here: no handler of an error runs."""


class FragileStore:
    """A store whose process is killed at its n-th write: before it, in the midst of it, or after it.

    Being killed while it reads is being killed after the write before.

    Attributes:
        calls: The writes so far.
    """

    def __init__(self, store: Store, last_call: int = 0, moment: str = "before") -> None:
        self._store, self._last_call, self._moment, self.calls = store, last_call, moment, 0
        self.uri = store.uri

    def __getattr__(self, name: str) -> object:
        method = getattr(self._store, name)
        if name not in ("swap", "delete", "write_if_absent", "upload", "copy"):
            return method

        def call(*arguments: Any) -> object:
            self.calls += 1
            is_last = self.calls == self._last_call
            if is_last and self._moment == "amidst" and name == "delete":
                method(arguments[0][: len(arguments[0]) // 2])
            if is_last and self._moment != "after":
                raise Killed
            result = method(*arguments)
            if is_last:
                raise Killed
            return result

        return call


@dataclass(frozen=True)
class Collectable:
    """A store to collect.

    Attributes:
        store: The store.
        files: What is in it at first.
        old: A plan that does not count any more at `LATER`.
        new: A plan that counts then.
        versions: The versions of the line, the oldest first; production names the second, and named the first.
    """

    store: Store
    files: dict[str, bytes]
    old: Plan
    new: Plan
    versions: tuple[Release, ...]

    @property
    def garbage(self) -> set[str]:
        """The folders that a collection at `LATER` removes."""
        return {
            f"artifacts/adapter/{self.old.step('train_qlora').key}",
            f"artifacts/dataset/{'f' * 64}",
            f"artifacts/dataset/{self.new.step('validate_data').key}/lost",
            f"artifacts/model/{self.new.step('merge_adapter').key}/lost",
            f"scratch/train_qlora/{self.old.step('train_qlora').key}",
            f"models/{LINE}/versions/{self.versions[2].version}",
        }


def write_artifact(store: Store, artifact: str, key: str, attempt: str = "winner") -> None:
    store.write_if_absent(f"artifacts/{artifact}/{key}/{attempt}/a.txt", b"a")
    document = {"artifact": artifact, "key": key, "attempt": attempt, "numbers": {}}
    store.write_if_absent(manifest_path(artifact, key), json.dumps(document).encode())


def write_plan(line: Path, root: str, at: datetime, learning_rate: str) -> Plan:
    return make_plan.make_plan(line, root, at=at, overrides=[f"train.learning_rate={learning_rate}", KEEP])


def build(store: Store, line: Path, folder: Path) -> Collectable:
    """Fill an empty store."""
    with pytest.MonkeyPatch.context() as patch:
        # Without keys: what is tested here is what a collection does with a store, not whom it believes.
        patch.setenv("QLORA_RETRAIN_IMAGE", "test")
        old = write_plan(line, store.uri, NOW, "1e-4")
        new = write_plan(line, store.uri, LATER - timedelta(days=1), "2e-4")
    for plan in (old, new):
        write_artifact(store, "dataset", plan.step("validate_data").key)
        write_artifact(store, "adapter", plan.step("train_qlora").key)
        store.write_if_absent(
            f"scratch/train_qlora/{plan.step('train_qlora').key}/a/checkpoint-3/_complete.json", b"{}"
        )
        store.write_if_absent(f"scratch/train_qlora/{plan.step('train_qlora').key}/a/checkpoint-3/state.pt", b"x")
    write_artifact(store, "dataset", "f" * 64)
    store.write_if_absent(f"artifacts/dataset/{new.step('validate_data').key}/lost/a.txt", b"a")
    store.write_if_absent(f"artifacts/model/{new.step('merge_adapter').key}/lost/a.txt", b"a")

    versions = tuple(publish_version(store, folder / str(number), number) for number in range(1, 5))
    for release in versions[:2]:
        registry.move_alias(store, LINE, registry.PRODUCTION, release, reason="a test", is_verified=True)
    files = {entry.path: store.read(entry.path).data for entry in store.list("")}
    return Collectable(store, files, old, new, versions)


def files_of(store: Store) -> dict[str, str]:
    """Every file of a store and its hash, but the mark, which is another one each time."""
    return {entry.path: store.sha256(entry.path) for entry in store.list("") if not entry.path.startswith("gc/")}


def refill(store: Store, files: dict[str, bytes]) -> None:
    """Let a store have these files and no others; what is there already stays."""
    present = {entry.path for entry in store.list("")}
    store.delete(sorted(present - files.keys()))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: store.write_if_absent(path, files[path]), sorted(files.keys() - present)))


def plan_of_later(plan: Plan, number: int) -> Plan:
    """Return a plan of another run that names the same, made at `LATER`."""
    run = f"{utc_stamp(LATER)}-{hashing.sha256_json([plan.run_id, number])[:12]}"
    return plan.model_copy(update={"run_id": run, "created_at": utc_stamp(LATER)})
