"""What a collection of garbage takes for named, and how long versions stay."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest

from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline import garbage, make_plan, plan_hold
from qlora_retrain.pipeline.collect import collect
from qlora_retrain.pipeline.evaluation_history import DatasetRecord
from qlora_retrain.pipeline.named import Names, read_names
from qlora_retrain.pipeline.plan import utc_stamp
from qlora_retrain.pipeline.planned_steps import PinnedVersion
from qlora_retrain.pipeline.stored_names import Documents
from qlora_retrain.storage import key_admin, keys, registry, signatures
from qlora_retrain.storage.artifact import manifest_path
from qlora_retrain.storage.store import Store
from tests.published import publish_version
from tests.storage.collectable import LATER, LINE, NOW, write_artifact

NAMED = "an alias names it, or a rollback needs it"
SHORT = "publish.keep={versions: 1, days: 14}"


def names(store: Store, days: float = 0) -> Names:
    return read_names(Documents(store), NOW + timedelta(days=days))


def staying(store: Store, days: float = 0) -> dict[int, str]:
    """Why versions of the line stay, by the day of their creation."""
    return {int(name[6:8]): reason for name, reason in names(store, days).lines[LINE].reasons.items()}


@pytest.fixture
def published(store: Store, line: Path, tmp_path: Path) -> Store:
    """A store with a plan that leaves one version, and four versions of January 2026, the last of them `latest`."""
    make_plan.make_plan(line, store.uri, overrides=[SHORT])
    releases = [publish_version(store, tmp_path / str(number), number) for number in range(1, 5)]
    registry.move_alias(store, LINE, "latest", releases[-1], reason="a test")
    return store


def test_a_version_stays_for_each_reason(published: Store, tmp_path: Path) -> None:
    assert staying(published) == {4: NAMED}
    first = publish_version(published, tmp_path / "1", 1)
    second = publish_version(published, tmp_path / "2", 2)
    registry.move_alias(published, LINE, "staging", first, reason="a test")
    assert set(staying(published)) == {1, 4}
    # Where a rollback would go.
    registry.move_alias(published, LINE, "staging", second, reason="a test")
    assert set(staying(published)) == {1, 2, 4}
    registry.rollback(published, LINE, "staging", reason="worse")
    assert set(staying(published)) == {1, 2, 4}


def test_while_an_alias_is_lost_every_version_stays(published: Store, tmp_path: Path) -> None:
    registry.move_alias(published, LINE, "staging", publish_version(published, tmp_path / "2", 2), reason="a test")
    assert set(staying(published)) == {2, 4}
    published.delete([f"models/{LINE}/aliases/staging.json"])
    assert set(staying(published)) == {1, 2, 3, 4}


def test_the_anchor_of_a_version_that_stays_stays(published: Store, tmp_path: Path) -> None:
    anchored = publish_version(published, tmp_path / "9", 9)
    path = f"{registry.version_folder(LINE, anchored.version)}/manifest.json"
    name = publish_version(published, tmp_path / "3", 3).version
    changed = signatures.sign(published, path, anchored.model_copy(update={"anchor": name}), keys.publish_role(LINE))
    published.delete([path])
    published.write_if_absent(path, changed.model_dump_json().encode())
    assert staying(published) == {4: NAMED, 9: "one of the newest 1", 3: "the anchor of a version that stays"}


def test_the_longest_policy_of_the_plans_that_count_holds(published: Store, line: Path) -> None:
    """Whoever starts a run with a smaller number of versions removes none by it."""
    make_plan.make_plan(line, published.uri, at=NOW - timedelta(days=5), overrides=["publish.keep={versions: 3}"])
    assert set(staying(published)) == {2, 3, 4}
    # Of a run that was made 31 days before, nothing was written since then.
    for path in Path(published.uri.removeprefix("file://"), "runs").rglob("*"):
        os.utime(path, ((NOW - timedelta(days=5)).timestamp(),) * 2)
    assert set(staying(published, 26)) == {4}


def test_a_plan_that_the_planner_did_not_sign_names_and_decides_nothing_else(published: Store, line: Path) -> None:
    plan = make_plan.make_plan(line, published.uri, at=LATER, overrides=["publish.keep={versions: 4}"])
    path = f"runs/{plan.run_id}/plan.json"
    assert set(staying(published)) == {1, 2, 3, 4}
    forged = plan.model_copy(update={"created_at": utc_stamp(NOW)})
    published.delete([path])
    published.write_if_absent(path, forged.to_bytes())
    assert set(staying(published)) == {4}
    assert plan.step("train_qlora").key in names(published).hashes


def test_without_keys_or_without_a_plan_no_version_goes(
    published: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key_admin.create(published, ["others"])
    further = publish_version(published, tmp_path / "further", 1, line="others")
    registry.move_alias(published, "others", "latest", further, reason="a test")
    read = names(published)
    assert len(read.lines["others"].reasons) == 1
    assert read.notes == ("others: no plan in the store says how many versions stay; all do",)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nobody"))
    with pytest.raises(UsageError, match="this process has no keys of the store"):
        collect(published, is_dry_run=True)


def test_a_run_that_is_begun_again_counts_anew(store: Store, line: Path) -> None:
    plan = make_plan.make_plan(line, store.uri, at=NOW - timedelta(days=40))
    store.delete([entry.path for entry in store.list(f"runs/{plan.run_id}/renewed")])
    for path in Path(store.uri.removeprefix("file://"), "runs").rglob("*"):
        os.utime(path, ((NOW - timedelta(days=40)).timestamp(),) * 2)
    assert plan.run_id not in names(store).counting
    assert make_plan.find_plan(store, plan.run_id) == plan
    assert plan.run_id in names(store).counting


def test_a_version_that_a_plan_pins_and_that_was_collected_ends_the_plan(published: Store, line: Path) -> None:
    plan = make_plan.make_plan(line, published.uri)
    name = next(iter(published.children(f"models/{LINE}/versions")))
    release = registry.read_release(published, LINE, name)
    pinned = PinnedVersion(version=name, manifest_sha256=release.sha256, content_hash=release.content_hash)
    plan = plan.model_copy(update={"reference": pinned})
    plan_hold.hold(published, plan)
    published.delete([f"models/{LINE}/versions/{name}/manifest.json"])
    with pytest.raises(UsageError, match="start a new run"):
        plan_hold.hold(published, plan)


def test_a_data_set_stays_until_a_later_history_has_what_it_evaluated(store: Store, line: Path) -> None:
    make_plan.make_plan(line, store.uri)

    def record(day: int, key: str, *joined: str) -> None:
        path = f"histories/{LINE}/datasets/202602{day:02d}T000000Z-{key}.json"
        document = DatasetRecord(line=LINE, dataset=key, history=None, joined=joined)
        store.write_if_absent(path, signatures.sign(store, path, document, keys.PLANNER).model_dump_json().encode())

    first, second = "a" * 64, "b" * 64
    for key in (first, second):
        write_artifact(store, "dataset", key)
    record(1, first)
    record(2, second, first)
    garbage_paths = {item.path for item in garbage.find(Documents(store), names(store, 29), LATER, 180)}
    assert garbage_paths == {f"artifacts/dataset/{first}"}


def test_the_version_that_a_plan_finds_published_stays(published: Store, line: Path) -> None:
    plan = make_plan.make_plan(line, published.uri)
    name = next(iter(published.children(f"models/{LINE}/versions")))
    document = f'{{"attempt": "a", "numbers": {{"version": "{name}"}}}}'
    published.write_if_absent(manifest_path("release", plan.step("publish").key), document.encode())
    assert staying(published)[int(name[6:8])] == "a plan that counts names it"
