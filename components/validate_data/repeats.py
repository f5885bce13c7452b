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
        for row in rows:
            if not row.reason and labels_by_prompt[prompt_key(row)] is None:
                row.reason = "conflicting_answer"


def _answer_key(row: Row) -> tuple[str, str]:
    turn = conversations.answer_turn(row.messages) or {}
    return conversations.turn_text(turn).strip(), str(turn.get("reasoning_content") or "").strip()


def _digest(*texts: str) -> bytes:
    return hashlib.blake2b(repr(texts).encode(errors="surrogatepass"), digest_size=12).digest()
