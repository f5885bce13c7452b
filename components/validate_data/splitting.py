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
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from components.validate_data.checks import Row, Split
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

    good_rows = [row for row in rows if not row.reason]
    openings, members, depth = list[str](), good_rows, 0
    while members:
        groups = _count_beginnings(members, depth, config)
        candidates = {digest for digest, count in groups.items() if _is_frequent(count, len(good_rows))}
        branches = _count_branches(members, depth, candidates, config) if candidates else {}
        shared = {d for d in candidates if branches[d] > _most_branches(groups[d], len(good_rows))}
        openings += shared
        # Of a chat that begins with openings alone, the next beginning may be one as well.
        members = [row for row in members if shared and _beginning(row, depth, config) in shared]
        depth += 1
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

    A row that is dropped from eval does not enter train, because a higher limit would bring it back to eval. With
    `judge_fraction` there is a third side, `judge`: that share of the training prompts, those with the largest hashes.

    Returns:
        The fraction below which a row's hash is evaluation.
    """
    good_rows = [row for row in rows if not row.reason]
    shared = frozenset(openings)
    # Only what few rows have is held in memory: the beginnings that say nothing, and the chats that are one.
    continued: set[str] = set()
    opening_rows: list[tuple[Row, Beginnings]] = []
    hashes_by_beginnings: dict[Beginnings, tuple[float, float]] = {}  # the lowest and the highest
    fractions = array("d")

    def add(row: Row, path: Beginnings) -> None:
        fraction = as_fraction(row.prompt_id)
        fractions.append(fraction)
        if beginnings := (*path[: path.index(row.prompt_id)], *digest_greeting(row, config.split_seed)):
            low, high = hashes_by_beginnings.get(beginnings, (fraction, fraction))
            hashes_by_beginnings[beginnings] = min(low, fraction), max(high, fraction)

    for row in good_rows:
        path = digest_side(row, config.split_seed)
        _, is_opening = _name_prompt(row, path, shared)
        continued |= shared.intersection(path[:-1])
        if is_opening:
            opening_rows.append((row, path))
        else:
            add(row, path)
    # An opening that no other chat goes on from is a conversation of its own.
    for row, path in opening_rows:
        if row.prompt_id not in continued:
            add(row, path)
    eval_fraction = choose_fraction(fractions, config)
    # The other end of the hashes, so that a larger eval_fraction takes nothing that a lab has judged by.
    first_judge = 1.0 - (config.judge_fraction or 0.0) * (1.0 - eval_fraction)

    def side_of(fraction: float) -> Split:
        return "eval" if fraction < eval_fraction else "judge" if fraction >= first_judge else "train"

    # The sides on which the chats of an opening or a greeting go on; those that are openings themselves follow them.
    sides: dict[str, set[Split]] = defaultdict(set)
    for beginnings, (low, high) in hashes_by_beginnings.items():
        for digest in beginnings:
            sides[digest] |= {side_of(low), side_of(high)}
    for row, _ in opening_rows:
        if row.prompt_id in continued:
            for digest in digest_greeting(row, config.split_seed):
                sides[digest] |= sides[row.prompt_id]

    evaluation: list[tuple[float, Row]] = []
    for row in good_rows:
        fraction = as_fraction(row.prompt_id)
        row_sides = sides.get(row.prompt_id) or {side_of(fraction)}
        if len(row_sides) > 1:
            row.reason = "shared_opening"
        elif "eval" in row_sides:
            evaluation.append((fraction, row))
        else:
            row.split = next(iter(row_sides))
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


def _beginning(row: Row, depth: int, config: DataConfig) -> str | None:
    path = digest_beginnings(row, config.split_seed)
    return path[depth] if len(path) > depth else None


def _count_beginnings(rows: Iterable[Row], depth: int, config: DataConfig) -> dict[str, int]:
    """Count the chats by their beginning at a depth, where more than one has it."""
    digests = array("Q")
    for row in rows:
        if digest := _beginning(row, depth, config):
            digests.append(int(digest, 16))
    values, counts = np.unique(np.frombuffer(digests, np.uint64), return_counts=True)
    is_repeated = counts > 1
    return {
        f"{value:016x}": count
        for value, count in zip(values[is_repeated].tolist(), counts[is_repeated].tolist(), strict=True)
    }


def _count_branches(rows: Iterable[Row], depth: int, digests: Collection[str], config: DataConfig) -> dict[str, int]:
    """Count for each of these beginnings the different chats with it that are the beginning of no other."""
    ends: dict[str, array[int]] = {digest: array("Q") for digest in digests}
    inner: dict[str, array[int]] = {digest: array("Q") for digest in digests}
    for row in rows:
        path = digest_beginnings(row, config.split_seed)
        if len(path) > depth and path[depth] in ends:
            ends[path[depth]].append(int(path[-1], 16))
            inner[path[depth]].extend(int(digest, 16) for digest in path[:-1])
    return {
        digest: len(np.setdiff1d(np.frombuffer(ends[digest], np.uint64), np.frombuffer(inner[digest], np.uint64)))
        for digest in digests
    }


def _is_frequent(num_chats: int, num_rows: int) -> bool:
    return num_chats > max(MAX_BRANCHES, num_rows * MAX_GROUP_FRACTION)


def _most_branches(num_chats: int, num_rows: int) -> int:
    """Return how many branches a beginning of so many chats may have, and still say what the chats are about."""
    return 1 if num_chats > num_rows * MAX_BRANCHED_FRACTION else MAX_BRANCHES
