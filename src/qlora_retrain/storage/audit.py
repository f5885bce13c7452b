"""The audit trail of a line: every state that an alias ever had, as the signed document that it was.

models/<line>/audit/<generation>-<alias>-<id>.json  one entry per move
"""

from __future__ import annotations

import contextlib
import heapq
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.storage import keys, signatures
from qlora_retrain.storage.registry_documents import Alias
from qlora_retrain.storage.store import AlreadyExists, NotFound, Store, root_option

# Entries that are read at once.
_NUM_READERS = 8
_NAME = re.compile(r"[a-z0-9-]+")
STRANGE_NAME = "this project gives no file such a name, so somebody else put it there"
_FILE_NAME = re.compile(r"([0-9]{8,12})-([a-z0-9-]+)-[0-9a-f]+\.json")


def alias_path(line: str, name: str) -> str:
    """Return the path of an alias's document."""
    return f"models/{line}/aliases/{name}.json"


def entry_path(line: str, name: str, state: Alias) -> str:
    """Return the path of the entry of an alias's state."""
    # The generation with leading zeros, so that the names sort by time.
    return f"models/{line}/audit/{state.generation:08d}-{name}-{state.request_id}.json"


def write_entry(store: Store, line: str, name: str, state: Alias) -> None:
    """Write the entry of a state, unless it is there."""
    # Another release of this code may have written the same entry in other bytes.
    with contextlib.suppress(AlreadyExists):
        store.write_if_absent(entry_path(line, name, state), state.model_dump_json(indent=1).encode())


def read_entry(store: Store, path: str) -> Alias:
    """Return the state in an audit entry.

    Raises:
        NotFound: If there is no such entry.
        IntegrityError: If it is none, the publisher of the line did not sign it, or it has another entry's name.
    """
    line = path.split("/")[1]
    data = store.read(path).data
    try:
        state = signatures.parse(
            store, path, data, Alias, keys.publish_role(line), signed_path=signatures.signed_path(path)
        )
    except ValueError as error:
        raise IntegrityError(f"{store.uri}/{path}: not an entry of the audit trail") from error
    if not path.endswith(f"-{state.request_id}.json") or f"/audit/{state.generation:08d}-" not in path:
        raise IntegrityError(f"{store.uri}/{path}: holds the entry of generation {state.generation}")
    return state


def entries(store: Store, line: str, name: str) -> Iterator[Alias]:
    """Return the states of an alias, the newest first; what is no valid entry is left out.

    Args:
        store: The store.
        line: The line.
        name: The alias.
    """
    folder = f"models/{line}/audit"
    for file_name in sorted(store.children(folder), reverse=True):
        if signatures.signed_path(f"{folder}/{file_name}") == alias_path(line, name):
            with contextlib.suppress(IntegrityError, NotFound):
                yield read_entry(store, f"{folder}/{file_name}")


def alias_names(store: Store, line: str) -> set[str]:
    """Return the names of the aliases of which the trail has a state."""
    return {name for name in map(alias_of_entry, store.children(f"models/{line}/audit")) if name}


def alias_of_entry(file_name: str) -> str | None:
    """Return the alias of which a file of the trail is an entry by its name; None where it is none."""
    match = _FILE_NAME.fullmatch(file_name)
    return match[2] if match else None


def newest_generation(store: Store, line: str, name: str) -> int:
    """Return the newest generation of an alias by the names of its entries, whoever wrote them; 0 where it has none."""
    matches = (_FILE_NAME.fullmatch(file_name) for file_name in store.children(f"models/{line}/audit"))
    return max((int(match[1]) for match in matches if match and match[2] == name), default=0)


def remembered_sha256(store: Store, line: str, version: str) -> str | None:
    """Return the hash of a version's manifest by the newest state of any alias that named it; None where none did."""
    folder = f"models/{line}/audit"
    for file_name in sorted(store.children(folder), reverse=True):
        if _FILE_NAME.fullmatch(file_name):
            with contextlib.suppress(IntegrityError, NotFound):
                state = read_entry(store, f"{folder}/{file_name}")
                if state.version == version:
                    return state.manifest_sha256
    return None


def read_alias(store: Store, line: str, name: str) -> tuple[Alias, str]:
    """Return the state in an alias's document, and the document's tag.

    Raises:
        NotFound: If there is no such alias.
        IntegrityError: If it is no alias, or the publisher of the line did not sign it.
    """
    path = alias_path(line, name)
    stored = store.read(path)
    try:
        return signatures.parse(store, path, stored.data, Alias, keys.publish_role(line)), stored.tag
    except ValueError as error:
        raise IntegrityError(
            f"{store.uri}/{path}: not an alias: expected the JSON document of one, found {len(stored.data):,} bytes "
            f"that are none; to put the newest state of the audit trail back, run: {repair_command(store, line)}"
        ) from error


def history(
    store: Store, line: str, *, assumed: Iterable[tuple[str, int]] = ()
) -> tuple[list[tuple[str, Alias]], list[str]]:
    """Read a line's whole audit trail.

    Args:
        store: The store.
        line: The line.
        assumed: (alias, generation) of entries that are taken to be there.

    Returns:
        (alias, state) of every valid entry, the oldest first, and a sentence for each fault: an entry that is none or
        that the line's publisher did not sign, and a move that has no entry, up to the alias's present state.
    """
    states: dict[str, list[Alias]] = defaultdict(list)
    generations: dict[str, set[int]] = defaultdict(set)
    for name, generation in assumed:
        generations[name].add(generation)
    faults: list[str] = []
    folder = f"models/{line}/audit"
    file_names = list(_names(store, folder))
    # Of a line of years these are thousands of requests.
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        entries_or_faults = list(pool.map(lambda name: _read_or_fault(store, f"{folder}/{name}"), file_names))
    for file_name, entry in zip(file_names, entries_or_faults, strict=True):
        match = _FILE_NAME.fullmatch(file_name)
        if match:
            generations[match[2]].add(int(match[1]))
        if isinstance(entry, str):
            faults.append(entry)
        elif match:
            states[match[2]].append(entry)

    for file_name in _names(store, f"models/{line}/aliases"):
        name = file_name.removesuffix(".json")
        if not (file_name.endswith(".json") and _NAME.fullmatch(name)):
            faults.append(f"{store.uri}/models/{line}/aliases/{file_name}: {STRANGE_NAME}")
            continue
        # An alias is a state like those in the trail, so it shows that the newest entries were removed.
        with contextlib.suppress(NotFound):
            try:
                generations[name].add(read_alias(store, line, name)[0].generation + 1)
            except IntegrityError as error:
                faults.append(str(error))
    faults += [f"{line}@{n}: {gap}" for n in sorted(generations) for gap in _gaps({0, *generations[n]})]
    # By time across the aliases, and by generation within each, since the clocks of those who move it may differ.
    by_alias = ([(name, state) for state in states[name]] for name in sorted(states))
    return list(heapq.merge(*by_alias, key=lambda move: move[1].at)), faults


def _read_or_fault(store: Store, path: str) -> Alias | str:
    """Return the state in a file of the trail, or a sentence that says why it has none."""
    if not _FILE_NAME.fullmatch(path.rpartition("/")[2]):
        return f"{store.uri}/{path}: {STRANGE_NAME}"
    try:
        return read_entry(store, path)
    except (IntegrityError, NotFound) as error:
        return str(error)


def _names(store: Store, folder: str) -> Iterator[str]:
    """Return the names of a folder's files without those that file managers and network disks hide there."""
    return (name for name in store.children(folder) if not name.startswith("."))


def _gaps(generations: set[int]) -> Iterator[str]:
    for before, after in pairwise(sorted(generations)):
        if after - before == 2:
            yield f"the entry of generation {before + 1} is missing"
        elif after - before > 2:
            yield f"the entries of the generations {before + 1} to {after - 1} are missing"


def refuse_older_state(store: Store, line: str, name: str, state: Alias | None) -> None:
    """Refuse a state of an alias that the audit trail says was left: an old document that somebody put back.

    Args:
        store: The store.
        line: The line.
        name: The alias.
        state: What the alias's document says; None: there is none.

    Raises:
        IntegrityError: If the trail has a later state, and the store has keys or the alias is lost.
    """
    # Without keys, whoever may put an old alias back may write a later entry too; and who only pulls may not list. An
    # alias that is lost is noticed in any case.
    if state is not None and keys.find_keyring(store.uri) is None:
        return
    newest = next(entries(store, line, name), None)
    if newest is None or (state is not None and newest.generation <= state.generation):
        return
    actual = f"is of generation {state.generation} and names {state.version}" if state else "is missing"
    raise IntegrityError(
        f"{store.uri}/{alias_path(line, name)}: {actual}, and the audit trail has generation {newest.generation} with "
        f"{newest.version}: somebody put an old alias back or removed it; to put the state of that entry back, run: "
        f"{repair_command(store, line)}"
    )


def repair_command(store: Store, line: str, *versions: str) -> str:
    """Return the command line that mends what is stuck in a line, and the files of these versions too."""
    return f"qlora-retrain models repair {shlex.join([line, *versions])} {root_option(store)}"
