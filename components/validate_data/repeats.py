"""Find rows that repeat another, and labels that contradict each other: by what the model is given, to the letter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from components.validate_data.checks import Row
from qlora_retrain.config.data import DataConfig
from qlora_retrain.lm import conversations


def prompt_key(row: Row) -> str:
    """Return what is equal for two rows that give the model the same before it answers, their tools included."""
    # The rendered prompt, where it was measured: a template may trim what two prompts differ by.
    return row.prompt_key or conversations.prompt_key(*row.chat_and_tools)


def quarantine_repeats(rows: Sequence[Row], config: DataConfig) -> None:
    """Give a reason to each good row that repeats an earlier row, or whose label another row contradicts."""
    labels_by_prompt: dict[str, bytes | None] = {}  # None where two rows disagree
    pairs: set[bytes] = set()
    for row in rows:
        if row.reason:
            continue
        prompt, (answer, reasoning) = prompt_key(row), _answer_key(row)
        label = _digest(answer)
        pair = _digest(prompt, answer, reasoning)
        if pair in pairs:
            row.reason = "exact_duplicate"
            continue
        pairs.add(pair)
        if labels_by_prompt.setdefault(prompt, label) != label:
            labels_by_prompt[prompt] = None

    # With free text, two answers to one prompt are both examples. With labels at least one of them is wrong.
    if config.task == "labels":
        rows_by_prompt: dict[str, list[Row]] = {}
        for row in rows:
            if not row.reason and labels_by_prompt[prompt := prompt_key(row)] is None:
                rows_by_prompt.setdefault(prompt, []).append(row)
        for conflicting_rows in rows_by_prompt.values():
            _name_conflicts(conflicting_rows)


def _name_conflicts(rows: Sequence[Row]) -> None:
    """Give the reason to rows of one prompt, each with the first row that has another label."""
    labels = [_answer_key(row)[0] for row in rows]
    for row, label in zip(rows, labels, strict=True):
        counterpart = next(r for r, other_label in zip(rows, labels, strict=True) if other_label != label)
        row.reason, row.detail = "conflicting_answer", f"that row is {counterpart.location}"


def _answer_key(row: Row) -> tuple[str, str]:
    turn = conversations.answer_turn(row.messages) or {}
    return conversations.turn_text(turn).strip(), str(turn.get("reasoning_content") or "").strip()


def _digest(*texts: str) -> bytes:
    return hashlib.blake2b(repr(texts).encode(errors="surrogatepass"), digest_size=12).digest()
