"""What the last move of an alias was, by its state and the audit trail.

A state that follows a move may be no move itself: a version is rejected, or a request is remembered. Then the entry of
the move says what it was.
"""

from __future__ import annotations

from qlora_retrain.storage import audit, rejections
from qlora_retrain.storage.registry_documents import Alias
from qlora_retrain.storage.store import Store


def has_moved(state: Alias) -> bool:
    """Return whether a state names another version than the one before it."""
    return state.generation == (state.moves[-1].generation if state.moves else 0) + 1


def find_rollback(store: Store, line: str, name: str, state: Alias) -> Alias | None:
    """Return the state that a rollback led to, if it was the last move of an alias; None after any other move.

    A rollback that was taken back, since what it left is not rejected any more, is none.
    """
    if not state.moves or state.action == "repair" or (state.action == "promote" and has_moved(state)):
        return None
    if state.action == "rollback" and has_moved(state):
        return state
    # States of before do not say what they are. What a rollback left is rejected.
    if state.action != "rollback" and not rejections.is_rejected_name(state, state.moves[-1].version):
        return None
    if state.action is None or has_moved(state):
        return state
    # What a move of another kind left may have been rejected by hand since.
    move = _entry(store, line, name, state)
    if move is None:
        return state
    has_rejected = rejections.is_rejected_name(move, state.moves[-1].version)
    return move if has_rejected and move.action in (None, "rollback") else None


def _entry(store: Store, line: str, name: str, state: Alias) -> Alias | None:
    """Return the entry of the move that led to a state; None where the trail has none that is valid."""
    generation = state.moves[-1].generation + 1
    for entry in audit.entries(store, line, name):
        if entry.generation <= generation:
            return entry if (entry.generation, entry.version) == (generation, state.version) else None
    return None
