"""`repair` mends what has one right state, says what it cannot mend, and moves nothing twice."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from qlora_retrain.core.errors import IntegrityError, TryAgain, UsageError
from qlora_retrain.storage import artifact, audit, key_admin, open_store, registry, repair
from qlora_retrain.storage.artifact import Manifest
from qlora_retrain.storage.local import LocalStore
from qlora_retrain.storage.registry import LATEST, PRODUCTION, Alias, Release
from qlora_retrain.storage.store import Store
from tests.storage import small_versions
from tests.storage.small_versions import ADAPTER, LINE, WEIGHTS

MODEL_KEY = "a" * 64


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def releases(local_store: Store) -> list[Release]:
    return [small_versions.publish(local_store, number) for number in (1, 2)]


def mend(store: Store, *versions: str, is_dry_run: bool = False) -> list[tuple[str, bool]]:
    """The subject of each fault, and whether it was mended."""
    findings = repair.repair(store, LINE, versions, reason="a test", is_dry_run=is_dry_run)
    return [(finding.subject, finding.is_mended) for finding in findings]


def state(store: Store, name: str = PRODUCTION) -> Alias:
    alias, _ = registry.read_alias(store, LINE, name)
    assert alias is not None
    return alias


def path_of(store: Store, release: Release, path: str) -> Path:
    return Path(store.uri.removeprefix("file://")) / registry.version_folder(LINE, release.version) / path


@pytest.mark.parametrize("deed", ["lost", "damaged", "an old copy"])
def test_an_alias_is_put_back_from_the_audit_trail(local_store: Store, releases: list[Release], deed: str) -> None:
    path, right = audit.alias_path(LINE, PRODUCTION), state(local_store)
    stored = local_store.read(path)
    first = audit.history(local_store, LINE)[0][0][1]
    texts = {"damaged": b"{}", "an old copy": first.model_dump_json(indent=1).encode()}
    if deed == "lost":
        local_store.delete([path])
    else:
        local_store.swap(path, texts[deed], stored.tag)
    assert mend(local_store, is_dry_run=True) == [(PRODUCTION, True)]
    assert mend(local_store) == [(PRODUCTION, True)]
    assert local_store.read(path).data == stored.data
    assert state(local_store) == right
    assert mend(local_store) == []


def test_a_lost_alias_of_a_store_with_keys_comes_back_signed(local_store: Store) -> None:
    key_admin.create(local_store, [LINE])
    small_versions.publish(local_store, 1)
    right = state(local_store)
    local_store.delete([audit.alias_path(LINE, PRODUCTION)])
    assert mend(local_store) == [(PRODUCTION, True)]
    assert state(local_store) == right
    assert state(local_store).signer is not None


def test_a_move_without_an_audit_entry_gets_it(local_store: Store, releases: list[Release]) -> None:
    entry = audit.entry_path(LINE, PRODUCTION, state(local_store))
    local_store.delete([entry])
    assert mend(local_store) == [(PRODUCTION, True)]
    assert audit.read_entry(local_store, entry) == state(local_store)


@pytest.mark.parametrize("deed", ["entries", "the alias and an entry"])
def test_a_dry_run_says_what_would_be_mended_and_what_would_be_left(
    local_store: Store, releases: list[Release], deed: str
) -> None:
    small_versions.publish(local_store, 3)
    entries = [f"models/{LINE}/audit/{name}" for name in local_store.children(f"models/{LINE}/audit")]
    local_store.delete(entries[1:] if deed == "entries" else entries[:1])
    if deed != "entries":
        path = audit.alias_path(LINE, PRODUCTION)
        local_store.swap(path, b"{}", local_store.read(path).tag)
    expected = [(PRODUCTION, True), ("audit trail", False)]
    assert mend(local_store, is_dry_run=True) == mend(local_store) == expected


def test_an_entry_that_is_not_accepted_is_a_fault_of_the_trail_and_never_called_mended(local_store: Store) -> None:
    key_admin.create(local_store, [LINE])
    release = small_versions.publish(local_store, 1)
    key_admin.rotate(local_store, f"publish-{LINE}", is_stolen=True)
    manifest = f"{registry.version_folder(LINE, release.version)}/manifest.json"
    key_admin.accept(local_store, [audit.alias_path(LINE, PRODUCTION), manifest])
    for is_dry_run in (True, False, False):
        assert mend(local_store, is_dry_run=is_dry_run) == [("audit trail", False)]


def keep_artifact(store: Store, release: Release) -> Release:
    """Give a version's model an artifact; return the version as its manifest names that one."""
    files = {path: small_versions.files_of(9)[path] for path in (WEIGHTS, ADAPTER)}
    manifest = Manifest(
        artifact="model", key=MODEL_KEY, step="merge_adapter", attempt="b" * 12, outcome="done", exit_code=0,
        numbers={}, files=small_versions.listed(files), inputs={}, config={}, code="c", provenance={},
    )  # fmt: skip
    for path, data in files.items():
        store.write_if_absent(f"{manifest.prefix}/{path}", data)
    store.write_if_absent(artifact.manifest_path("model", MODEL_KEY), manifest.model_dump_json().encode())
    return release


def publish_with_artifact(store: Store) -> Release:
    files = small_versions.files_of(9)
    release = small_versions.release_of(small_versions.listed(files), 9)
    release = release.model_copy(update={"keys": {"merge_adapter": MODEL_KEY}})
    for path, data in files.items():
        store.write_if_absent(f"{registry.version_folder(LINE, release.version)}/{path}", data)
    release = keep_artifact(store, registry.complete_version(store, release))
    registry.move_alias(store, LINE, PRODUCTION, release, reason="a test")
    return release


def test_files_of_a_version_come_again_from_its_artifacts(local_store: Store, releases: list[Release]) -> None:
    release = publish_with_artifact(local_store)
    path_of(local_store, release, WEIGHTS).write_bytes(b"x")
    path_of(local_store, release, ADAPTER).unlink()
    assert mend(local_store, is_dry_run=True) == [(release.version, True)] * 2
    with pytest.raises(IntegrityError):
        registry.verify_version(local_store, release)
    assert mend(local_store) == [(release.version, True)] * 2
    registry.verify_version(local_store, release)
    assert state(local_store).generation == 3


class CollectedStore(LocalStore):
    """A store whose artifacts a collection removes while files are copied from them."""

    def copy(self, pairs: Iterable[tuple[str, str]]) -> None:
        pairs = list(pairs)
        self.delete([source for source, _ in pairs])
        super().copy(pairs)


def test_an_artifact_that_is_collected_while_a_version_is_mended_is_no_bug_of_ours(local_store: Store) -> None:
    path_of(local_store, publish_with_artifact(local_store), WEIGHTS).unlink()
    with pytest.raises(TryAgain, match=r"was removed while a file of version .* run the same command again"):
        mend(CollectedStore(local_store.uri))


def test_an_alias_whose_version_is_lost_for_good_goes_back(local_store: Store, releases: list[Release]) -> None:
    registry.move_alias(local_store, LINE, LATEST, releases[0], reason="a test")
    registry.move_alias(local_store, LINE, LATEST, releases[1], reason="a test")
    path_of(local_store, releases[1], WEIGHTS).unlink()
    assert mend(local_store, is_dry_run=True) == [(LATEST, True), (PRODUCTION, True)]
    assert state(local_store).version == releases[1].version
    assert mend(local_store) == [(LATEST, True), (PRODUCTION, True)]
    for name in (LATEST, PRODUCTION):
        assert (state(local_store, name).version, state(local_store, name).action) == (releases[0].version, "repair")
    # It was lost and not rejected: once its files are back, it may be promoted.
    assert not state(local_store).rejected
    assert mend(local_store) == []

    path_of(local_store, releases[0], WEIGHTS).unlink()
    assert mend(local_store) == [(LATEST, False), (PRODUCTION, False)]


def test_latest_of_a_clock_that_ran_ahead_goes_to_the_newest_version(
    local_store: Store, releases: list[Release]
) -> None:
    ahead = small_versions.release_of((), 3).model_copy(update={"version": f"20990101T000000Z-{3:012x}"})
    ahead = registry.complete_version(local_store, ahead)
    registry.move_alias(local_store, LINE, LATEST, ahead, reason="a test")
    assert mend(local_store) == [(LATEST, True)]
    assert state(local_store, LATEST).version == releases[1].version


def test_a_further_version_is_mended_by_name_and_an_unknown_line_is_refused(
    local_store: Store, releases: list[Release]
) -> None:
    path_of(local_store, releases[0], WEIGHTS).unlink()
    assert mend(local_store) == []
    assert mend(local_store, releases[0].version) == [(releases[0].version, False)]
    with pytest.raises(UsageError, match="line another has published nothing"):
        repair.repair(local_store, "another", reason="a test")
