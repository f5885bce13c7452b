"""What readers see of a line: compared after interruptions, and checked for anything that is not true."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection

from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage import audit, registry
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store
from tests.storage.small_versions import LINE

# (path, tag, sha256) of what was read and was right.
_WHOLE: set[tuple[str, str, str]] = set()


def versions(store: Store) -> dict[str, Release]:
    """The versions of the line."""
    result = {}
    for name in store.children(f"models/{LINE}/versions"):
        # What lacks a manifest is no version.
        with contextlib.suppress(UsageError):
            result[name] = registry.read_release(store, LINE, name)
    return result


def alias_names(store: Store) -> list[str]:
    """The aliases of the line."""
    return [name.removesuffix(".json") for name in store.children(f"models/{LINE}/aliases")]


def assert_nothing_false(store: Store, damaged: Collection[str] = ()) -> None:
    """No version without its files, no alias that names anything else, no move missing before the last.

    Versions that a test has damaged may be without their files; still no alias names one.
    """
    for release in versions(store).values():
        if release.version not in damaged:
            assert_whole(store, release)
    for name in alias_names(store):
        alias, _ = registry.read_alias(store, LINE, name)
        assert alias is not None
        assert_whole(store, registry.read_release(store, LINE, alias.version, sha256=alias.manifest_sha256))
        files = [path.split("-") for path in store.children(f"models/{LINE}/audit")]
        generations = {int(parts[0]) for parts in files if "-".join(parts[1:-1]) == name}
        assert set(range(1, alias.generation)) <= generations <= set(range(1, alias.generation + 1))


def assert_whole(store: Store, release: Release) -> None:
    """A version has each of its files, with the bytes that its manifest names."""
    folder = registry.version_folder(LINE, release.version)
    tags = {entry.path: entry.tag for entry in store.list(folder)}
    for file in release.files:
        path = f"{folder}/{file.path}"
        assert path in tags
        # What a server calls by the same tag was read before; a folder has no tags.
        if not tags[path] or (path, tags[path], file.sha256) not in _WHOLE:
            assert store.sha256(path) == file.sha256, path
            _WHOLE.add((path, tags[path], file.sha256))


def published(store: Store) -> dict[str, object]:
    """What there is to see, without what differs from try to try: random ids, times, and signatures."""
    aliases = {name: registry.read_alias(store, LINE, name)[0] for name in alias_names(store)}
    states, faults = audit.history(store, LINE)
    return {
        "versions": {
            name: {file.path: file.sha256 for file in release.files if file.path != "model.sig"}
            for name, release in versions(store).items()
        },
        "folders": set(store.children(f"models/{LINE}/versions")),
        "aliases": {
            name: (state.version, state.generation, [m.version for m in state.moves], state.rejected)
            for name, state in aliases.items()
            if state is not None
        },
        "audit": sorted((name, state.generation, state.version, state.reason) for name, state in states),
        "faults": faults,
        "releases": {
            entry.path: {**json.loads(store.read(entry.path).data)["numbers"], "seconds": None}
            for entry in store.list("artifacts/release")
            if entry.path.endswith("/_manifest.json")
        },
    }
