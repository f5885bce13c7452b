"""Read the rows that contestants are scored on (`eval.jsonl`), and read and write their scores (`scores.jsonl`).

Text is read and never written: a score holds a row's id, its slices, and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_retrain.core import json_lines
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.lm import chat, conversations

UNPARSABLE = "(no label)"  # the prediction of a model that was to generate a label and generated other text


@dataclass(frozen=True, slots=True)
class Row:
    """A chat to be scored.

    Attributes:
        id: Names this row alone among those of its suite; scores and completions are looked up by it.
        suite: `eval`, `golden` or `train`.
        messages: The turns.
        language: What the data states, if it states one.
        tools: The tools that the answer may call, in the OpenAI form.
        prompt_id: Names the row's prompt, which other rows may have too; where it is empty, no other row has it.
    """

    id: str
    suite: str
    messages: chat.Chat
    language: str | None = None
    tools: list[dict[str, Any]] | None = None
    prompt_id: str = ""

    @property
    def prompt(self) -> str:
        """Return the id of the row's prompt; that of the row where it has a prompt of its own."""
        return self.prompt_id or self.id


@dataclass(frozen=True, slots=True)
class RowScore:
    """A model's scores on one row.

    Attributes:
        id: The row's id.
        suite: `eval`, `golden`, `train` or `reference`.
        loss_nats: The negative log-likelihood, summed over the answer's tokens.
        tokens: The number of tokens in that sum.
        predicted: The likeliest label, where there are labels.
        correct: Whether that is the row's answer.
        hits: The number of tokens that the model finds likeliest; counted on reference text.
        values: Metrics of the model's completion, each in [0, 1]; empty where none was generated.
        slices: The slices that the row belongs to, e.g. `label=refund`, `length=32-63`, `language=latin`.
        prompt_id: Names the row's prompt, as in `Row`.
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
    prompt_id: str = ""

    @property
    def prompt(self) -> str:
        """Return the id of the row's prompt; that of the row where it has a prompt of its own."""
        return self.prompt_id or self.id

    def as_json(self) -> dict[str, Any]:
        """Return the fields that are set, fit for JSON: a loss that is not finite becomes null."""
        # Empty fields are left out, which keeps the line of a row short.
        fields = {name: value for name, value in asdict(self).items() if value not in (None, {}, ())}
        if not self.prompt_id:
            del fields["prompt_id"]
        return fields | {"loss_nats": self.loss_nats if math.isfinite(self.loss_nats) else None}


def read_rows(path: Path, suite: str) -> list[Row]:
    """Read the rows of `eval.jsonl`, `golden.jsonl` or `train.jsonl`.

    Where a row states no `prompt_id`, as in data sets of older releases, it is derived from its turns.

    Raises:
        IntegrityError: If a line is not a row, or has the id of an earlier one.
    """
    rows: list[Row] = []
    first_numbers: dict[str, int] = {}
    for number, row in json_lines.read(path):
        try:
            prompt_id = str(row.get("prompt_id") or "") or conversations.prompt_id(row["messages"])
            rows.append(Row(str(row["id"]), suite, row["messages"], row.get("language"), row.get("tools"), prompt_id))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            text = f'{path.name}:{number}: the line is not a row; it must be {{"id", "messages"}}: {error!r}'
            raise IntegrityError(text) from error

        # One row would be credited with the completion that was generated for the other.
        first = first_numbers.setdefault(rows[-1].id, number)
        if first != number:
            raise IntegrityError(f"{path.name}:{number}: has the id of line {first}; make the dataset again")
    return rows


def write_scores(path: Path, scores: Mapping[str, Sequence[RowScore]]) -> None:
    """Write `scores.jsonl`: one line per contestant and row."""
    records = (
        {"contestant": contestant, **score.as_json()}
        for contestant, contestant_scores in scores.items()
        for score in contestant_scores
    )
    json_lines.write(path, records)


def read_scores(path: Path) -> dict[str, list[RowScore]]:
    """Read the scores of each contestant, in the order of the file.

    Raises:
        IntegrityError: If a line is not a score.
    """
    scores: dict[str, list[RowScore]] = {}
    for number, record in json_lines.read(path):
        try:
            # JSON has no NaN and no infinity, so such a loss was written as null.
            loss = math.nan if record["loss_nats"] is None else float(record["loss_nats"])
            fields = {k: v for k, v in record.items() if k != "contestant"}
            fields |= {"loss_nats": loss, "slices": tuple(record.get("slices", ()))}
            scores.setdefault(record["contestant"], []).append(RowScore(**fields))
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path.name}:{number}: the line is not a row's score: {error!r}") from error
    return scores


def count_prompts(rows: Iterable[Row | RowScore]) -> int:
    """Count the different prompts of the rows."""
    return len({row.prompt for row in rows})


def describe_rows(rows: Sequence[Row | RowScore]) -> str:
    """Say how many rows there are, and how many prompts they have where that differs."""
    return describe_counts(len(rows), count_prompts(rows))


def describe_counts(rows: int, prompts: int) -> str:
    """Say the same of counts: `838 rows of 110 different prompts`, or `12 rows`."""
    return f"{rows} rows" + (f" of {prompts} different prompts" if prompts < rows else "")
