"""Put every imitated family and every kind of row through the module under test, and have the judge read the result."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from components.validate_data import checks, encoding
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm.chat import ChatTokenizer, EncodedChat, RowRefused, load_tokenizer
from qlora_retrain.lm.chat_format import ChatFormat
from tests.lm.families.family import Family
from tests.lm.families.judge import OUTCOMES, Verdict, judge
from tests.lm.families.reading import clock
from tests.lm.families.row_reading import Reading
from tests.lm.families.rows import KINDS, Row, rows_of_kind

# The day that the line's plan resolved, and the days on which the row is encoded.
PLANNED_DAY, CLOCKS = "2026-11-20", ("2026-11-27", "2027-02-03")


@dataclass(frozen=True)
class Model:
    """A family's folder, loaded by the module under test and, apart from it, for the judge."""

    family: Family
    chat: ChatTokenizer
    tokenizer: Any
    kwargs: Mapping[str, object]


def load_model(family: Family, folder: Path, kwargs: Mapping[str, object] | None = None) -> Model:
    """Load a family's folder, with variables of its template."""
    chat_format = ChatFormat(date=PLANNED_DAY, template_kwargs=dict(kwargs or {}))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Model(family, load_tokenizer(folder, chat_format), tokenizer, kwargs or {})


def encode_as_the_gate(chat: ChatTokenizer, row: Row) -> list[EncodedChat]:
    """Encode a row that the data gate lets pass.

    Raises:
        RowRefused: If the gate gives the row a reason.
    """
    gated = checks.Row("rows.jsonl", 1, row.messages, "", tools=row.tools)
    # Where no row of a source can be rendered, the gate ends the step; the row has its reason by then.
    with suppress(UsageError), redirect_stdout(io.StringIO()):
        encoding.encode_rows([gated], DataConfig(), chat, "raw_data")
    if gated.reason:
        raise RowRefused(gated.reason, gated.detail)
    return chat.encode(row.messages, row.tools)


def judge_row(model: Model, row: Row) -> tuple[Reading, Verdict]:
    """Encode a row on several days, and judge the results; return the judge's reading too."""
    results: list[Any] = []
    # Where the template does not read the clock, one kind of row on several days is enough.
    reads_clock = "strftime_now" in str(model.family.template)
    for day in CLOCKS if reads_clock or row.kind == 2 else CLOCKS[:1]:
        with clock(day):
            # Whatever the module raises is a result; the judge says what it is worth.
            try:
                results.append(encode_as_the_gate(model.chat, row))
            except Exception as error:  # noqa: BLE001
                results.append(error)
    reading = Reading(model.family, row, model.tokenizer, PLANNED_DAY, dict(model.kwargs))
    return reading, judge(reading, results)


def cell_of(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict of a cell: the worst of its variants."""
    return max(verdicts, key=lambda verdict: OUTCOMES.index(verdict.outcome))


def verdicts_of(model: Model) -> dict[int, list[Verdict]]:
    """Return the verdicts on every kind of row for one family, one for each variant."""
    return {kind: [judge_row(model, row)[1] for row in rows_of_kind(kind, model.family)] for kind in KINDS}
