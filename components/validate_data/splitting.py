"""Which good rows count once, which are kept out, and which side of the split each falls on.

The side is a hash of the salt and the prompt alone, so a row never moves between train and eval as data grows, and rows
of one prompt always fall on the same side. The system turn and letter case do not enter (`chat.canonical`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

from components.validate_data.checks import Row
from qlora_retrain.config.sections import DataConfig
from qlora_retrain.lm import chat


def prompt_text(row: Row) -> str:
    """The text by which two prompts count as equal."""
    return chat.canonical(chat.prompt_of(row.messages))


def share(salt: str | None, prompt: str) -> float:
    """Where the prompt lies in [0, 1): below `eval_fraction` is evaluation."""
    digest = hashlib.sha256(f"{salt or ''}\n{prompt}".encode()).hexdigest()
    return int(digest[:16], 16) / 2**64


def quarantine_repeats(rows: Iterable[Row], config: DataConfig, golden_prompts: Collection[str]) -> None:
    """Give a reason to rows whose prompt is golden, that repeat another, or whose label another row contradicts."""
    answers: dict[str, dict[str, Row]] = {}  # prompt -> answer -> the first row that says so
    for row in rows:
        if row.reason:
            continue
        prompt = prompt_text(row)
        said = answers.setdefault(prompt, {})
        answer = chat.answer_of(row.messages).strip()
        if prompt in golden_prompts:
            row.reason = "in_golden_set"
        elif answer in said:
            row.reason = "exact_duplicate"
        else:
            said[answer] = row
    if config.task == "labels":
        for said in answers.values():
            if len(said) > 1:
                for row in said.values():
                    row.reason = "conflicting_answer"


def split(rows: Iterable[Row], config: DataConfig) -> None:
    """Send each row without a reason to train or eval; beyond `max_eval_rows` those with the largest hash are dropped.

    What is dropped from eval does not enter train: with more data or a higher limit it would come back to eval.
    """
    evaluation: list[tuple[float, str, Row]] = []
    for row in rows:
        if row.reason:
            continue
        prompt = prompt_text(row)
        where = share(config.salt, prompt)
        if where < config.eval_fraction:
            evaluation.append((where, chat.answer_of(row.messages), row))
        else:
            row.split = "train"
    evaluation.sort(key=lambda item: item[:2])
    for i, (_, _, row) in enumerate(evaluation):
        row.split = "eval" if i < config.max_eval_rows else "dropped"
