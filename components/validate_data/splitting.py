"""Keep repeated, contradicted and golden rows out, and split the others into train and eval.

The split is a hash of the split seed and the prompt alone. So a row never moves between train and eval as data grows,
and all rows of one prompt are in the same split. The system turn and letter case do not count (`chat.normalized_text`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

from components.validate_data.checks import Row
from qlora_retrain.config.sections import DataConfig
from qlora_retrain.lm import chat


def prompt_text(row: Row) -> str:
    """Return the text by which two prompts count as equal."""
    return chat.normalized_text(chat.prompt_of(row.messages))


def hash_fraction(split_seed: str | None, prompt: str) -> float:
    """Map the prompt to a number that is uniform over [0, 1); a number below `eval_fraction` means evaluation."""
    digest = hashlib.sha256(f"{split_seed or ''}\n{prompt}".encode()).hexdigest()
    # The first 64 bits of the hash, as a fraction.
    return int(digest[:16], 16) / 2**64


def quarantine_repeats(rows: Iterable[Row], config: DataConfig, golden_prompts: Collection[str]) -> None:
    """Give a reason to each row whose prompt is golden, that repeats a row, or whose label another row contradicts."""
    answers_by_prompt: dict[str, dict[str, Row]] = {}  # by prompt, then by answer: the first row with that answer
    for row in rows:
        if row.reason:
            continue

        prompt = prompt_text(row)
        first_rows = answers_by_prompt.setdefault(prompt, {})
        answer = chat.answer_of(row.messages).strip()
        if prompt in golden_prompts:
            row.reason = "in_golden_set"
        elif answer in first_rows:
            row.reason = "exact_duplicate"
        else:
            first_rows[answer] = row

    # With free text, two answers to one prompt are both examples. With labels at least one of them is wrong.
    if config.task == "labels":
        for first_rows in answers_by_prompt.values():
            if len(first_rows) > 1:
                for row in first_rows.values():
                    row.reason = "conflicting_answer"


def assign_splits(rows: Iterable[Row], config: DataConfig) -> None:
    """Assign each good row to train or eval; beyond `max_eval_rows`, drop the rows with the largest hash.

    A row that is dropped from eval does not enter train, because a higher limit would bring it back to eval.
    """
    evaluation: list[tuple[float, str, Row]] = []
    for row in rows:
        if row.reason:
            continue

        prompt = prompt_text(row)
        fraction = hash_fraction(config.split_seed, prompt)
        if fraction < config.eval_fraction:
            evaluation.append((fraction, chat.answer_of(row.messages), row))
        else:
            row.split = "train"

    # Sorted by hash and answer, so that the order of the input files does not decide which rows are dropped.
    evaluation.sort(key=lambda item: item[:2])
    for i, (_, _, row) in enumerate(evaluation):
        row.split = "eval" if i < config.max_eval_rows else "dropped"
