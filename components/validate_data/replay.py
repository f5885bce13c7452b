"""Choose the rows of replay_data that train beside the line's own, so that the model keeps what it could do before.

They are read and checked as rows of raw_data are, and never evaluated. What keeps the line's own rows apart from its
evaluation keeps them apart too. They are no part of the line's data: no limit, no drift and no label counts them.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.validate_data.checks import Row, explain_fault
from components.validate_data.evaluated_before import REASON, History, keep_out_evaluated
from components.validate_data.repeats import quarantine_repeats
from components.validate_data.similar_rows import check_similar_rows
from components.validate_data.splitting import as_fraction, keep_apart
from components.validate_data.text_words import split_words
from qlora_retrain.config.data import DataConfig
from qlora_retrain.evaluation import reference_text
from qlora_retrain.lm import conversations

SOURCE = "replay_data"
# Two texts that share so many words in a row have them from one source; a shorter text must be the other as a whole.
_SHARED_WORDS = 13
_FIELDS = (
    "messages_field", "prompt_field", "prompt_template", "response_field", "system_field", "tools_field", "group_field",
)  # fmt: skip
_MAX_NAMED_ROWS = 5
_MAX_NAMED_REASONS = 3


def replay_settings(config: DataConfig) -> DataConfig:
    """Return the settings by which replay rows are read: they are general chats, without the line's task.

    The fields that the line names are those of its own files. Chats are recognised; whole texts never are, so a line of
    texts has replay texts in the same field.
    """
    changes: dict[str, Any] = {"system": None, "task": "text"}
    if config.text_field is None:
        changes |= {"format": "auto", "keep": {}} | dict.fromkeys(_FIELDS)
    return config.model_copy(update=changes)


def choose_replay(
    replay: Sequence[Row],
    rows: Sequence[Row],
    golden: Sequence[Row],
    history: History,
    config: DataConfig,
    openings: Collection[str],
) -> None:
    """Put each good replay row into training, give it a reason, or drop it where there are more than are asked for.

    Args:
        replay: The rows of replay_data.
        rows: The line's own rows, with their sides.
        golden: All golden rows.
        history: The prompts that the line has evaluated before.
        config: The line's settings.
        openings: The beginnings that do not say what a chat is about.
    """
    settings = replay_settings(config)
    quarantine_repeats(replay, settings)
    training = [row for row in rows if row.split == "train"]
    own_ids = {conversations.row_id(*row.chat_and_tools) for row in training}
    for row in replay:
        if not row.reason and conversations.row_id(*row.chat_and_tools) in own_ids:
            row.reason = "exact_duplicate"

    # Rows beyond `max_eval_rows` come back to the evaluation with a higher limit.
    evaluation = [row for row in rows if row.split in ("eval", "dropped") or row.reason == REASON]
    for reserved, reason in ((golden, "in_golden_set"), (evaluation, "in_eval_data")):
        # Copies, since this names their prompts, and those of the line's rows are named by its own split.
        keep_apart(replay, [copy.copy(row) for row in reserved], reason, settings, openings)
    for row in replay:
        row.split = None if row.reason else "train"
    keep_out_evaluated(replay, history, settings, openings)
    check_similar_rows([*replay, *evaluation], golden, settings)
    _limit(used(replay), len(training), config)


def used(replay: Iterable[Row]) -> list[Row]:
    """Return the rows that train."""
    return [row for row in replay if row.split == "train"]


def explain_refusal(replay: Sequence[Row], reference_data: Path | None, config: DataConfig) -> str:
    """Return why the replay rows are refused; empty where they are accepted. Rows are named, and never shown."""
    if refused := [row for row in replay if row.reason and config.checks.get(row.reason) == "refuse"]:
        return f"data refused: {SOURCE}: {explain_fault(refused[0], config)} ({len(refused):,} rows)"
    if not used(replay):
        counts = Counter(row.reason or "beyond data.replay_fraction" for row in replay)
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts.most_common(_MAX_NAMED_REASONS))
        return f"data refused: {SOURCE}: none of its {len(replay):,} rows is left to train on ({reasons or 'no row'})"
    if shared := _rows_of_reference(used(replay), reference_data):
        listed = ", ".join(row.location for row in shared[:_MAX_NAMED_ROWS])
        further = ", ..." if len(shared) > _MAX_NAMED_ROWS else ""
        return (
            f"data refused: {SOURCE}: {len(shared):,} rows share text with reference_data ({listed}{further}), so that "
            "what the model forgets could no longer be measured; take these rows out, or other reference text"
        )
    return ""


def describe(replay: Sequence[Row], num_train: int, config: DataConfig) -> dict[str, Any]:
    """Return the numbers of the profile."""
    training = used(replay)
    reasons = Counter(row.reason for row in replay if row.reason)
    return {
        "read": len(replay),
        "used": len(training),
        "beyond_fraction": sum(row.split == "dropped" for row in replay),
        "fraction": round(len(training) / max(1, len(training) + num_train), 6),
        "replay_fraction": config.replay_fraction,
        "files": dict(sorted(Counter(row.file for row in training).items())),
        "reasons": _sorted(reasons),
        "warnings": _sorted(Counter(name for row in training for name in row.hits)),
    }


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def sentence(numbers: dict[str, Any]) -> str:
    """Return how many replay rows train, and what was asked for."""
    target = numbers["replay_fraction"]
    few = target is not None and not numbers["beyond_fraction"] and numbers["fraction"] < target
    note = f"; data.replay_fraction: {target:g} asks for as many or more, and there are no more" if few else ""
    return (
        f"{numbers['used']:,} of {numbers['read']:,} replay rows train, {numbers['fraction']:.1%} of all training rows"
        f"{note}"
    )


def _limit(training: list[Row], num_own: int, config: DataConfig) -> None:
    """Drop rows beyond `data.replay_fraction`: those with the largest hashes, so that more rows change few of them."""
    if config.replay_fraction is None:
        return
    limit = round(num_own * config.replay_fraction / (1 - config.replay_fraction))
    training.sort(key=lambda row: (as_fraction(row.prompt_id), conversations.row_id(*row.chat_and_tools)))
    for row in training[limit:]:
        row.split = "dropped"


def _rows_of_reference(rows: Sequence[Row], reference_data: Path | None) -> list[Row]:
    """Return the rows that share text with a passage."""
    if reference_data is None:
        return []
    runs: set[bytes] = set()
    for passage in reference_text.read_passages(reference_data):
        runs.update(_runs(passage if isinstance(passage, str) else _spoken_text(passage)))
    return [row for row in rows if not runs.isdisjoint(_runs(_spoken_text(row.messages)))]


def _spoken_text(messages: Sequence[dict[str, Any]]) -> str:
    """Return what a chat says, without its system turn, which many chats share."""
    return "\n".join(conversations.turn_text(turn) for turn in messages if turn["role"] != "system")


def _runs(text: str) -> Iterator[bytes]:
    """Yield a digest of every run of words; of a shorter text one of the whole."""
    words = split_words(text)
    for start in range(max(1, len(words) - _SHARED_WORDS + 1)):
        run = b" ".join(words[start : start + _SHARED_WORDS])
        if run:
            yield hashlib.blake2b(run, digest_size=8).digest()
