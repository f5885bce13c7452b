"""Find rows that repeat another, and labels that contradict each other: by what the model is given, to the letter."""

from __future__ import annotations

from collections.abc import Iterable

from components.validate_data.checks import Row
from qlora_retrain.config.data import DataConfig
from qlora_retrain.lm import conversations


def prompt_key(row: Row) -> str:
    """Return what is equal for two rows that give the model the same before it answers, their tools included."""
    # The rendered prompt, where it was measured: a template may trim what two prompts differ by.
    return row.prompt_key or conversations.prompt_key(row.messages, row.tools)


def quarantine_repeats(rows: Iterable[Row], config: DataConfig) -> None:
    """Give a reason to each good row that repeats an earlier row, or whose label another row contradicts."""
    # By prompt, then by answer: the first row with that answer.
    answers_by_prompt: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row.reason:
            continue

        first_rows = answers_by_prompt.setdefault(prompt_key(row), {})
        answer = _answer_key(row)
        if answer in first_rows:
            row.reason = "exact_duplicate"
        else:
            first_rows[answer] = row

    # With free text, two answers to one prompt are both examples. With labels at least one of them is wrong.
    if config.task == "labels":
        for first_rows in answers_by_prompt.values():
            if len({label for label, _ in first_rows}) > 1:
                for (label, _), row in first_rows.items():
                    row.reason = "conflicting_answer"
                    counterpart = next(r for (other_label, _), r in first_rows.items() if other_label != label)
                    row.detail = f"that row is {counterpart.location}"


def _answer_key(row: Row) -> tuple[str, str]:
    turn = conversations.answer_turn(row.messages) or {}
    return conversations.turn_text(turn).strip(), str(turn.get("reasoning_content") or "").strip()
