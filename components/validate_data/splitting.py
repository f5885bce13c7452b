"""Put every conversation on one side, train or eval, and keep golden and evaluation conversations out of training.

Where `data.group_field` names a group for a row (a document, a user, a template), the group alone decides its side.
A conversation is a chat with all of its beginnings and continuations. Its side is a hash of the split seed and its
first user turn in canonical text, so a row never crosses the split as data grows, and letter case does not count.

Where many different chats share their first user turns ("hello", one instruction), these would all be one group. Such a
beginning is a shared opening: its chats are told apart by their system turn and then by their further user turns.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from components.validate_data.checks import Row
from components.validate_data.sizes import choose_fraction
from qlora_retrain.config.data import DataConfig
from qlora_retrain.lm import conversations

# A beginning is a shared opening where more than this fraction of the rows has it, and it goes on in more different
# chats than this. One conversation of many turns, or one with a few branches, stays a group.
MAX_GROUP_FRACTION = 0.1
MAX_BRANCHES = 10
# A beginning of more than this fraction of the rows is one wherever it branches at all: a side would stay empty.
MAX_BRANCHED_FRACTION = 0.5
# The digests of a chat's path after each of its elements; two chats share a digest where they share the beginning.
Beginnings = tuple[str, ...]


def digest_beginnings(row: Row, split_seed: str | None) -> Beginnings:
    """Return 16 hex digits for every beginning of the row's path."""
    return _digest_elements(conversations.conversation_path(row.messages), split_seed)


def digest_side(row: Row, split_seed: str | None) -> Beginnings:
    """Return the same of what decides the row's side: its group where it has one, else its conversation."""
    if row.group is None:
        return digest_beginnings(row, split_seed)
    # A user turn begins with its role, so a group is never taken for one.
    return _digest_elements([f"group: {conversations.canonical_text(row.group)}"], split_seed)


def digest_greeting(row: Row, split_seed: str | None) -> Beginnings:
    """Return the same of what the assistant says before the first user turn: a beginning that is no part of the path.

    Many chats have one greeting, so it must not decide their side. It may be a whole row elsewhere.
    """
    greeting = conversations.greeting_of(row.messages)
    return _digest_elements(conversations.conversation_path(greeting), split_seed) if greeting else ()


def _digest_elements(path: Iterable[str], split_seed: str | None) -> Beginnings:
    # One hash goes through the whole path, so that long chats do not cost the square of their length.
    state, digests = hashlib.sha256(f"{split_seed or ''}".encode()), []
    for element in path:
        state.update(f"\n{element}".encode())
        digests.append(state.hexdigest()[:16])
    return tuple(digests)


def as_fraction(digest: str) -> float:
    """Map a digest to a number that is uniform over [0, 1)."""
    return int(digest, 16) / 2**64


def find_openings(rows: Iterable[Row], config: DataConfig) -> tuple[str, ...]:
    """Return the shared openings: those that the line's earlier version was split by, else those of the good rows."""
    # Another opening would move rows across the split, so a line keeps the ones that it began with.
    if config.shared_openings is not None:
        return config.shared_openings

    paths = [digest_beginnings(row, config.split_seed) for row in rows if not row.reason]
    openings, pending = [], [(0, paths)]
    while pending:
        depth, members = pending.pop()
        groups: dict[str, list[Beginnings]] = defaultdict(list)
        for path in members:
            if len(path) > depth:
                groups[path[depth]].append(path)
        for digest, group in groups.items():
            if _is_shared(group, len(paths)):
                openings.append(digest)
                pending.append((depth + 1, group))
    return tuple(sorted(openings))


def keep_apart(
    rows: Iterable[Row], reserved: Sequence[Row], reason: str, config: DataConfig, openings: Collection[str]
) -> None:
    """Give the reason to every good row that is a reserved conversation, or a beginning or continuation of one.

    Name the prompt of all rows, reserved ones too.
    """
    keys: set[str] = set()
    endings: set[str] = set()  # reserved chats that are a shared opening
    inner: set[str] = set()
    greetings: set[str] = set()
    for row in reserved:
        path = digest_beginnings(row, config.split_seed)
        key, is_opening = _name_prompt(row, path, openings)
        keys.add(key)
        inner.update(path)
        greetings.update(digest_greeting(row, config.split_seed))
        if is_opening:
            endings.add(key)

    for row in rows:
        if row.reason:
            continue
        path = digest_beginnings(row, config.split_seed)
        key, is_opening = _name_prompt(row, path, openings)
        # A chat that is itself a shared opening is the beginning of all that go on from it.
        is_kept_apart = key in keys or (is_opening and key in inner) or not endings.isdisjoint(path)
        if is_kept_apart or key in greetings or not keys.isdisjoint(digest_greeting(row, config.split_seed)):
            row.reason = reason


def assign_splits(rows: Iterable[Row], config: DataConfig, openings: Collection[str] = ()) -> float:
    """Assign each good row to train or eval, and name its prompt; beyond `max_eval_rows`, drop the largest hashes.

    A row that is dropped from eval does not enter train, because a higher limit would bring it back to eval.

    Returns:
        The fraction below which a row's hash is evaluation.
    """
    good_rows = [row for row in rows if not row.reason]
    paths = [digest_side(row, config.split_seed) for row in good_rows]
    # An opening that no other chat goes on from is a conversation of its own.
    continued = {digest for path in paths for digest in path[:-1]}
    named = [_name_prompt(row, path, openings) for row, path in zip(good_rows, paths, strict=True)]
    groups = [(key, is_opening and key in continued) for key, is_opening in named]
    fractions = [as_fraction(key) for key, is_opening in groups if not is_opening]
    eval_fraction = choose_fraction(fractions, config)

    # The sides on which the chats of an opening or a greeting go on; those that are openings themselves follow them.
    sides: dict[str, set[bool]] = defaultdict(set)
    for row, path, (key, is_opening) in sorted(zip(good_rows, paths, groups, strict=True), key=lambda item: item[2][1]):
        row_sides = sides[key] if is_opening else {as_fraction(key) < eval_fraction}
        openings_before = () if is_opening else path[: path.index(key)]
        for digest in (*openings_before, *digest_greeting(row, config.split_seed)):
            sides[digest] |= row_sides

    evaluation: list[tuple[float, Row]] = []
    for row, (key, _) in zip(good_rows, groups, strict=True):
        is_eval = as_fraction(key) < eval_fraction
        if len(sides[key]) == 2:
            row.reason = "shared_opening"
            continue
        if sides[key]:
            is_eval = True in sides[key]
        if is_eval:
            evaluation.append((as_fraction(key), row))
        else:
            row.split = "train"
    limit_evaluation(evaluation, config)
    return eval_fraction


def reserve_evaluation(rows: Iterable[Row], config: DataConfig) -> None:
    """Make all good rows evaluation, as those of `eval_data` are; drop those beyond `max_eval_rows`."""
    good_rows = [row for row in rows if not row.reason]
    fractions = [as_fraction(digest_side(row, config.split_seed)[0]) for row in good_rows]
    limit_evaluation(list(zip(fractions, good_rows, strict=True)), config)


def limit_evaluation(evaluation: list[tuple[float, Row]], config: DataConfig) -> None:
    """Assign the rows with the smallest hashes to eval, and drop those beyond `max_eval_rows`."""
    # Sorted by hash and row, so that the order of the input files does not decide which rows are dropped.
    evaluation.sort(key=lambda item: (item[0], conversations.row_id(*item[1].chat_and_tools)))
    for i, (_, row) in enumerate(evaluation):
        row.split = "eval" if i < config.max_eval_rows else "dropped"


def _name_prompt(row: Row, path: Beginnings, openings: Collection[str]) -> tuple[str, bool]:
    """Return the row's `_group`, whose key is also the id of its prompt: rows on one side by one hash are a cluster."""
    key, is_opening = _group(path, openings)
    row.prompt_id = key
    return key, is_opening


def _group(path: Beginnings, openings: Collection[str]) -> tuple[str, bool]:
    """Return the first beginning that is no shared opening, and whether the whole chat is one."""
    key = next(itertools.filterfalse(openings.__contains__, path), None)
    return (path[-1], True) if key is None else (key, False)


def _is_shared(group: Sequence[Beginnings], num_rows: int) -> bool:
    """Return whether a beginning that these chats have in common says little about them."""
    if len(group) <= max(MAX_BRANCHES, num_rows * MAX_GROUP_FRACTION):
        return False
    most_branches = 1 if len(group) > num_rows * MAX_BRANCHED_FRACTION else MAX_BRANCHES
    return _count_branches(group) > most_branches


def _count_branches(paths: Sequence[Beginnings]) -> int:
    """Count the different chats that are the beginning of no other."""
    continued = {digest for path in paths for digest in path[:-1]}
    return len({path[-1] for path in paths} - continued)
