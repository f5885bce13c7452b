"""The audit trail of a line: every state that an alias ever had, as the signed document that it was.

models/<line>/audit/<generation>-<alias>-<id>.json  one entry per move
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.storage import keys, signatures
from qlora_retrain.storage.registry_documents import Alias
from qlora_retrain.storage.store import AlreadyExists, NotFound, Store

_FILE_NAME = re.compile(r"[0-9]+-([a-z0-9-]+)-[0-9a-f]+\.json")


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


def history(store: Store, line: str) -> tuple[list[tuple[str, Alias]], list[str]]:
    """Read a line's whole audit trail.

    Returns:
        (alias, state) of every valid entry, the oldest first, and a sentence for each fault: an entry that is none or
        that the line's publisher did not sign, and a move that has no entry.
    """
    states: list[tuple[str, Alias]] = []
    faults: list[str] = []
    folder = f"models/{line}/audit"
    for file_name in store.children(folder):
        entry = _FILE_NAME.fullmatch(file_name)
        try:
            if entry is None:
                raise IntegrityError(f"{store.uri}/{folder}/{file_name}: no name of an entry")
            states.append((entry[1], read_entry(store, f"{folder}/{file_name}")))
        except (IntegrityError, NotFound) as error:
            faults.append(str(error))

    for name in sorted({name for name, _ in states}):
        generations = {state.generation for alias, state in states if alias == name}
        missing = sorted(set(range(1, max(generations) + 1)) - generations)
        faults += [f"{line}@{name}: the entry of generation {number} is missing" for number in missing]
    return states, faults


def refuse_older_state(store: Store, line: str, name: str, state: Alias | None) -> None:
    """Refuse a state of an alias that the audit trail says was left: an old document that somebody put back.

    Args:
        store: The store.
        line: The line.
        name: The alias.
        state: What the alias's document says; None: there is none.

    Raises:
        IntegrityError: If the store has keys, and the trail has a later state.
    """
    # Without keys, whoever may put an old alias back may write a later entry too.
    if keys.find_keyring(store.uri) is None:
        return
    newest = next(entries(store, line, name), None)
    if newest is None or (state is not None and newest.generation <= state.generation):
        return
    actual = f"is of generation {state.generation} and names {state.version}" if state else "is missing"
    raise IntegrityError(
        f"{store.uri}/{alias_path(line, name)}: {actual}, and the audit trail has generation {newest.generation} with "
        f"{newest.version}: somebody put an old alias back or removed it; put the document of that entry there"
    )
