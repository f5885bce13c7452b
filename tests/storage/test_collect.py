"""A collection of garbage removes what nothing names, whatever kills it and whoever works beside it, on both stores."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.config.publish import KeepConfig
from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.pipeline import collect as collect_module
from qlora_retrain.pipeline import line_versions, plan_hold
from qlora_retrain.pipeline.collect import Collection, collect
from qlora_retrain.pipeline.stored_names import Documents
from qlora_retrain.storage import audit, collection_mark, key_admin, open_store, registry, unfinished_uploads
from qlora_retrain.storage.artifact import manifest_path
from qlora_retrain.storage.collection_mark import Marker
from qlora_retrain.storage.s3 import S3Store
from qlora_retrain.storage.store import NotFound, Store
from tests.conftest import ticket_rows, write_jsonl
from tests.storage import collectable, small_versions
from tests.storage.collectable import LATER, LINE, Collectable, FragileStore, Killed, files_of, plan_of_later


@pytest.fixture(scope="module")
def blueprint(tmp_path_factory: pytest.TempPathFactory) -> Collectable:
    """The store that every test gets a copy of."""
    folder = tmp_path_factory.mktemp("blueprint")
    (folder / "base").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / "base" / name).write_text("{}")
    write_jsonl(folder / "tickets.jsonl", ticket_rows(30))
    line = folder / "intents.yaml"
    line.write_text("line: intents\nsources:\n  raw_data: tickets.jsonl\n  base_model: base\n")
    return collectable.build(open_store((folder / "store").as_uri()), line, folder / "versions")


@pytest.fixture
def built(store: Store, blueprint: Collectable) -> Collectable:
    collectable.refill(store, blueprint.files)
    return dataclasses.replace(blueprint, store=store)


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a collection that was killed waits no longer than a moment."""
    monkeypatch.setattr(collection_mark, "LEASE_SECONDS", 0.04)
    monkeypatch.setattr(Marker, "may_remove", lambda self: True)


def paths(collection: Collection) -> set[str]:
    return {item.path for item in collection.items}


def test_what_nothing_names_goes_and_all_else_stays(built: Collectable) -> None:
    before = files_of(built.store)
    dry = collect(built.store, is_dry_run=True, at=LATER)
    assert paths(dry) == built.garbage
    assert files_of(built.store) == before
    assert not list(built.store.children("gc"))

    removed: list[str] = []
    collection = collect(built.store, is_dry_run=False, at=LATER, on_removed=lambda item: removed.append(item.path))
    assert paths(collection) == set(removed) == built.garbage
    assert collection.spared == ()
    expected = {path: h for path, h in before.items() if not path.startswith(tuple(f"{p}/" for p in built.garbage))}
    assert files_of(built.store) == expected
    assert collect(built.store, is_dry_run=False, at=LATER).items == ()
    assert collection_mark.read_mark(built.store)[0].names == ()  # type: ignore[union-attr]


def test_runs_go_by_their_age_and_the_plan_of_a_line_stays(built: Collectable) -> None:
    runs = {built.old.run_id, built.new.run_id}
    for days, expected in [(90, {built.old.run_id}), (600, {built.old.run_id})]:
        collection = collect(built.store, is_dry_run=True, run_days=60, at=LATER + timedelta(days=days))
        # No plan counts by then, and the line's newest says how many versions stay.
        assert {item.name for item in collection.items if item.kind == "run"} == expected < runs


def test_a_collection_that_is_killed_at_any_write_is_finished_by_the_next(
    built: Collectable, short_leases: None
) -> None:
    store = built.store
    whole = FragileStore(store)
    collect(whole, is_dry_run=False, at=LATER)
    expected = files_of(store)

    assert whole.calls >= 5
    # On a server one moment for each write, since each costs a store.
    moments = ("amidst",) if isinstance(store, S3Store) else ("before", "amidst", "after")
    for last_call in range(1, whole.calls + 1):
        for moment in moments:
            collectable.refill(store, built.files)
            with pytest.raises(Killed):
                collect(FragileStore(store, last_call, moment), is_dry_run=False, at=LATER)
            # Wherever it stopped, whatever has a manifest is whole.
            for path in {path for path in expected if path.endswith("anifest.json")}:
                assert store.sha256(path) == expected[path]
            collect(store, is_dry_run=False, at=LATER)
            assert files_of(store) == expected, (last_call, moment)


def between(monkeypatch: pytest.MonkeyPatch, *, before_reading: bool, act: Callable[[], object]) -> None:
    """Act once, after the first mark and before or after the collection has read what is named."""
    real, acts = collect_module.read_names, [act]

    def read_names(documents: Any, at: Any) -> Any:
        mark, _ = collection_mark.read_mark(documents.store)
        is_batch = mark is not None and mark.names and acts
        if is_batch and before_reading:
            acts.pop()()
        names = real(documents, at)
        if is_batch and not before_reading:
            acts.pop()()
        return names

    monkeypatch.setattr(collect_module, "read_names", read_names)


def test_a_plan_that_is_written_before_the_collection_looks_keeps_what_it_names(
    built: Collectable, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of_later(built.old, 1)
    between(monkeypatch, before_reading=True, act=lambda: built.store.write_if_absent(
        f"runs/{plan.run_id}/plan.json", plan.to_bytes()
    ))  # fmt: skip
    collection = collect(built.store, is_dry_run=False, at=LATER)
    key = built.old.step("train_qlora").key
    assert {item.path for item in collection.spared} == {f"artifacts/adapter/{key}", f"scratch/train_qlora/{key}"}
    assert built.store.read(manifest_path("adapter", key))


def test_a_plan_that_is_written_after_it_waits_until_what_it_names_is_gone(
    built: Collectable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection_mark, "_POLL_SECONDS", 0.01)
    plan, path = plan_of_later(built.old, 1), manifest_path("adapter", built.old.step("train_qlora").key)
    is_there: list[bool] = []

    def plan_and_look() -> None:
        store = open_store(built.store.uri)
        plan_hold.write_plan(store, plan)
        is_there.append(path in {entry.path for entry in store.list("artifacts")})

    planner = threading.Thread(target=plan_and_look)

    def start() -> None:
        planner.start()
        time.sleep(0.3)
        assert is_there == []

    between(monkeypatch, before_reading=False, act=start)
    collect(built.store, is_dry_run=False, at=LATER)
    planner.join()
    assert is_there == [False]


@pytest.mark.parametrize("before_reading", [True, False])
def test_an_alias_moves_to_a_version_that_stays_or_not_at_all(
    built: Collectable, monkeypatch: pytest.MonkeyPatch, before_reading: bool
) -> None:
    monkeypatch.setattr(collection_mark, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(line_versions, "_MOVE_DAYS", 60)  # the move is made now, and the collection later
    release, faults = built.versions[2], list[str]()

    def move() -> None:
        try:
            registry.move_alias(open_store(built.store.uri), LINE, "staging", release, reason="a race")
        except UsageError as error:
            faults.append(str(error))

    mover = threading.Thread(target=move)

    def start() -> None:
        mover.start()
        # The announcement is in the store, and the mover waits at the mark.
        while not list(built.store.children(f"models/{LINE}/moving")):
            time.sleep(0.01)
        time.sleep(0.1)

    between(monkeypatch, before_reading=before_reading, act=start)
    collection = collect(built.store, is_dry_run=False, at=LATER)
    mover.join()
    state, _ = registry.read_alias(built.store, LINE, "staging")
    if before_reading:
        assert release.version in {item.name for item in collection.spared}
        assert state is not None
        registry.verify_version(built.store, registry.read_release(built.store, LINE, state.version))
        assert not list(built.store.children(f"models/{LINE}/moving"))
    else:
        assert state is None
        assert "was removed by a collection of garbage just now" in faults[0]


def test_runs_that_race_with_a_collection_find_what_they_name_whole_or_gone(
    built: Collectable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection_mark, "_POLL_SECONDS", 0.002)
    monkeypatch.setattr(collect_module, "_BATCH_ITEMS", 2)
    store, number = built.store, count()
    key = built.old.step("train_qlora").key
    is_gone: list[bool] = []

    def finds(uri: str, outcomes: list[bool]) -> None:
        store = open_store(uri)
        plan_hold.write_plan(store, plan_of_later(built.old, next(number)))
        try:
            outcomes.append(bool(store.read(manifest_path("adapter", key))))
        except NotFound:
            outcomes.append(False)

    for round_number in range(3 if isinstance(store, S3Store) else 8):
        collectable.refill(store, built.files)
        outcomes: list[bool] = []
        threads = [threading.Thread(target=finds, args=(store.uri, outcomes)) for _ in range(3)]
        collector = threading.Thread(target=collect, args=(store,), kwargs={"is_dry_run": False, "at": LATER})
        collector.start()
        for thread in threads:
            time.sleep(round_number * 0.002)
            thread.start()
        for thread in (*threads, collector):
            thread.join()
        present = {entry.path for entry in store.list(f"artifacts/adapter/{key}")}
        # What a run has found is still there, and nothing is there in part.
        assert bool(present) >= any(outcomes)
        assert len(outcomes) == 3
        assert present in (set(), {manifest_path("adapter", key), f"artifacts/adapter/{key}/winner/a.txt"})
        is_gone.append(not present)
    assert is_gone


def test_there_is_one_collection_at_a_time(built: Collectable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection_mark, "_POLL_SECONDS", 0.01)
    first, refused = Marker(built.store), list[TryAgain]()
    first.begin()

    def second() -> None:
        try:
            collect(open_store(built.store.uri), is_dry_run=False, at=LATER)
        except TryAgain as error:
            refused.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    while not refused:
        time.sleep(0.05)
        first.write(["a"])  # it goes on
    thread.join()
    assert "another collection of garbage is under way on" in str(refused[0])
    first.end()
    assert paths(collect(built.store, is_dry_run=False, at=LATER)) == built.garbage


def test_who_waits_for_a_collection_that_was_killed_goes_on(built: Collectable, short_leases: None) -> None:
    dead = Marker(built.store)
    dead.begin()
    dead.write([built.old.step("train_qlora").key])
    plan_hold.write_plan(built.store, plan_of_later(built.old, 1))
    assert built.old.step("train_qlora").key not in {
        i.name for i in collect(built.store, is_dry_run=False, at=LATER).items
    }
    with pytest.raises(TryAgain, match="another collection"):
        dead.write(["x"])


def test_an_alias_moves_on_after_a_collection_that_was_killed(store: Store, short_leases: None) -> None:
    store.write_if_absent("models/l/versions/v/manifest.json", b"{}")
    dead = Marker(store)
    dead.begin()
    dead.write(["v"])
    args = (store, "l", "v", "models/l/aliases/production.json", b"{}", None)
    thread = threading.Thread(target=collection_mark.swap_alias, args=args, daemon=True)
    thread.start()
    thread.join(60)
    assert store.read("models/l/aliases/production.json").data == b"{}"
    assert not list(store.children("models/l/moving"))


@pytest.mark.parametrize("folder", ["aliases", "audit", "both"])
def test_every_version_stays_while_nobody_knows_what_an_alias_names(
    blueprint: Collectable, tmp_path: Path, folder: str
) -> None:
    store = open_store((tmp_path / "store").as_uri())
    collectable.refill(store, blueprint.files)
    before = files_of(store)
    alias, *entries = (path for path in sorted(before) if "/aliases/" in path or "/audit/" in path)
    # Lost, or damaged together with the newest entry: an earlier one does not say what it named since.
    store.delete([alias, *(entries if folder == "both" else [])])
    if folder == "audit":
        store.delete(entries[-1:])
        for path in (alias, entries[-1]):
            store.write_if_absent(path, b"")
    collection = collect(store, is_dry_run=False, at=LATER)
    assert not [item for item in collection.items if item.kind == "version"]
    assert "all versions stay" in collection.notes[0]
    # A run that goes on needs no alias, and what else is garbage goes.
    assert paths(collection) == {path for path in blueprint.garbage if not path.startswith("models/")}


@pytest.fixture
def local(blueprint: Collectable, tmp_path: Path) -> Collectable:
    store = open_store((tmp_path / "store").as_uri())
    collectable.refill(store, blueprint.files)
    return dataclasses.replace(blueprint, store=store)


def test_what_somebody_else_put_into_a_store_stays_and_takes_nothing_elses_place(local: Collectable) -> None:
    store, folder = local.store, f"models/{LINE}/versions"
    newest = local.versions[3].version
    manifest = store.read(f"{folder}/{newest}/manifest.json").data
    forged = {**json.loads(manifest), "sequence": 10**9}
    strange = {
        # A copy that a person made, and what claims to be the newest version.
        f"{folder}/{newest}.bak/manifest.json": manifest,
        f"{folder}/20990101T000000Z-{'0' * 12}/manifest.json": json.dumps(forged).encode(),
        f"{folder}/.DS_Store": b"x",
        "artifacts/dataset/backup/train/rows.jsonl": b"{}",
        f"artifacts/old/dataset/{'e' * 64}/rows.jsonl": b"{}",
    }
    for path, data in strange.items():
        store.write_if_absent(path, data)
    # The number of versions to keep is written in the plan by a later release.
    plan = f"runs/{local.new.run_id}/plan.json"
    document = json.loads(store.read(plan).data)
    for step in document["steps"]:
        if "keep" in step["config"]:
            step["config"]["keep"]["tagged"] = True
    store.swap(plan, json.dumps(document).encode(), store.read(plan).tag)

    assert paths(collect(store, is_dry_run=False, at=LATER)) == local.garbage
    assert strange.keys() <= files_of(store).keys()


def test_the_files_of_a_version_that_an_alias_names_wait_for_its_lost_manifest(local: Collectable) -> None:
    version = local.versions[1].version
    local.store.delete([f"models/{LINE}/versions/{version}/manifest.json"])
    collection = collect(local.store, is_dry_run=False, at=LATER)
    assert paths(collection) == local.garbage
    assert f"{version}: an alias or a plan names it, and its manifest is lost" in collection.notes[0]


def test_no_alias_that_the_publisher_did_not_sign_decides_what_goes(tmp_path: Path) -> None:
    store = open_store((tmp_path / "signed").as_uri())
    key_admin.create(store, [LINE])
    releases = [small_versions.publish(store, number) for number in (1, 2, 3)]
    alias = audit.alias_path(LINE, "production")
    in_production = registry.move_alias(store, LINE, "production", releases[0], reason="a test", is_verified=True)
    assert in_production is not None

    def reasons() -> Mapping[str, str]:
        policy = KeepConfig(versions=1, days=1)
        return line_versions.read_line_versions(Documents(store), LINE, policy, [], [], LATER).reasons

    # A forged document, and an old one, each beside a newer entry of the trail.
    forged = in_production.model_copy(update={"version": releases[2].version, "moves": (), "generation": 9})
    store.write_if_absent(audit.entry_path(LINE, "production", forged), forged.model_dump_json().encode())
    first = next(path for path in files_of(store) if "/audit/00000001-production-" in path)
    for document in (forged.model_dump_json().encode(), store.read(first).data):
        store.swap(alias, document, store.read(alias).tag)
        assert releases[0].version in reasons()


def test_what_may_not_be_removed_does_not_keep_all_else(local: Collectable, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a").touch()
    refused = f"artifacts/dataset/{'f' * 64}"
    (tmp_path / "store" / refused / "winner" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match=r"/winner/link: is a link; .*; 1 of the items could not be removed, and all"):
        collect(local.store, is_dry_run=False, at=LATER)
    assert {"/".join(path.split("/")[:3]) for path in files_of(local.store)} & local.garbage == {refused}
    assert paths(collect(local.store, is_dry_run=True, at=LATER)) == {f"{refused}/winner"}
    assert (tmp_path / "outside" / "a").exists()


def test_uploads_that_were_never_finished_go(built: Collectable) -> None:
    store = built.store
    if isinstance(store, S3Store):
        bucket, prefix = store.uri.removeprefix("s3://").split("/", 1)
        for key in (f"{prefix}/artifacts/big", "another store/big", f"{prefix}/of others/big"):
            store.client.create_multipart_upload(Bucket=bucket, Key=key)
        expected = "artifacts/big"
    else:
        hidden = Path(store.uri.removeprefix("file://").replace("%20", " "), "artifacts", ".store-host-1-0123")
        hidden.write_bytes(b"half")
        expected = "artifacts/.store-host-1-0123"
    assert [upload.path for upload in unfinished_uploads.find(store)] == [expected]
    if not isinstance(store, S3Store):  # moto says of every upload that it began in 2010
        assert expected not in paths(collect(store, is_dry_run=False))  # a week has not passed
    assert expected in paths(collect(store, is_dry_run=True, at=LATER))
    assert expected in paths(collect(store, is_dry_run=False, at=LATER))
    assert unfinished_uploads.find(store) == []
