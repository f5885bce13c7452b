"""The rows that contestants are scored on, and what a model makes of each: `eval.jsonl` in, `scores.jsonl` out.

Text is read and never written: a score holds a row's id, its slices, and numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.lm import chat

UNPARSABLE = "(no label)"  # what a model that writes its labels is said to predict where it wrote none of them


@dataclass(frozen=True, slots=True)
class Row:
    """A chat to be scored; `language` is what the data says of it, if it does."""

    id: str
    suite: str
    messages: chat.Chat
    language: str | None = None


@dataclass(frozen=True, slots=True)
class RowScore:
    """What a model makes of one row.

    Attributes:
        id: The row's id.
        suite: `eval`, `golden`, `train` or `reference`.
        loss_nats: Negative log-likelihood, summed over the answer's tokens.
        tokens: How many tokens that sum has.
        predicted: The likeliest label, where there are labels.
        correct: Whether that is the row's answer.
        hits: How many of the tokens the model would have chosen itself; counted on reference text.
        values: Metrics of what the model wrote, each in [0, 1]; empty where none was asked for.
        slices: What the row belongs to, e.g. `label=refund`, `length=32-63`, `language=latin`.
    """

    id: str
    suite: str
    loss_nats: float
    tokens: int
    predicted: str | None = None
    correct: bool | None = None
    hits: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    slices: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The fields that are known, fit for JSON: a loss that is not finite becomes null."""
        known = {name: value for name, value in asdict(self).items() if value not in (None, {}, ())}
        return known | {"loss_nats": self.loss_nats if math.isfinite(self.loss_nats) else None}


def read_rows(path: Path, suite: str) -> list[Row]:
    """The rows of `eval.jsonl` or `golden.jsonl`.

    Raises:
        IntegrityError: If a line is not a row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(Row(str(row["id"]), suite, row["messages"], row.get("language")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f'{path.name}:{number}: wanted {{"id", "messages"}}: {error!r}') from error
    return rows


def write_scores(path: Path, scores: Mapping[str, Sequence[RowScore]]) -> None:
    """Write `scores.jsonl`: one line a contestant and row."""
    with path.open("w", encoding="utf-8") as file:
        for contestant, found in scores.items():
            for score in found:
                file.write(json.dumps({"contestant": contestant, **score.as_json()}) + "\n")


def read_scores(path: Path) -> dict[str, list[RowScore]]:
    """The scores of each contestant, in the order written.

    Raises:
        IntegrityError: If a line is not a score.
    """
    scores: dict[str, list[RowScore]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            loss = math.nan if record["loss_nats"] is None else float(record["loss_nats"])
            known = {k: v for k, v in record.items() if k != "contestant"}
            known |= {"loss_nats": loss, "slices": tuple(record.get("slices", ()))}
            scores.setdefault(record["contestant"], []).append(RowScore(**known))
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path.name}:{number}: not a row's score: {error!r}") from error
    return scores
