"""Check the limits of the data gate by Great Expectations, over a data frame of features with one line per row.

The frame holds counts, lengths and flags. Text never enters it, and a label only where labels are a closed set. An
expectation of severity `critical` refuses the data, and a `warning` is only shown. An expectation that cannot be
computed is an error and says nothing about the data.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas
from numpy.typing import NDArray

from components.validate_data.checks import LOOKED_FOR, NOT_BAD, Row
from components.validate_data.judge_rows import MIN_JUDGE_PROMPTS
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import conversations

# Set before the import, which reads it: some versions report usage over the network.
os.environ["GX_ANALYTICS_ENABLED"] = "false"
with warnings.catch_warnings():
    # Great Expectations imports modules that Python 3.11 deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    import great_expectations
    from great_expectations.data_context.types.base import ProgressBarsConfig

gxe = great_expectations.expectations
Outcome = Literal["met", "warn", "refuse"]
Limit = float | int | None


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one expectation: its limits, the observed value and the outcome."""

    name: str
    expectation: str
    observed: float | int | None
    low: Limit
    high: Limit
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Expectation:
    """An expectation to check; `kind` is its class in Great Expectations."""

    name: str
    text: str
    kind: Any
    settings: Mapping[str, object]
    refuses: bool = False
    low: Limit = None
    high: Limit = None


def check_expectations(rows: Sequence[Row], config: DataConfig) -> list[Finding]:
    """Return the finding of every expectation, in a fixed order; rows that the line does not keep do not count.

    Raises:
        UsageError: If an expectation could not be computed.
    """
    rows = [row for row in rows if row.reason != "not_kept"]
    split_rows = [row for row in rows if row.split in ("train", "eval")]
    expectations = _row_limits(config) + (_check_limits(config) if rows else [])
    # Great Expectations would find nothing wrong with a column without values.
    if split_rows:
        expectations += _length_limits(config) + (_label_limits(split_rows) if config.task == "labels" else [])

    context = great_expectations.get_context(mode="ephemeral")
    suite = great_expectations.ExpectationSuite(name="limits")
    for e in expectations:
        severity = "critical" if e.refuses else "warning"
        suite.add_expectation(e.kind(**e.settings, severity=severity, meta={"name": e.name}))
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)

    asset = context.data_sources.add_pandas("rows").add_dataframe_asset("features")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": features(rows, config)})
    results = {r.expectation_config.meta["name"]: r for r in batch.validate(context.suites.add(suite)).results}
    return [_to_finding(e, results[e.name]) for e in expectations]


def features(rows: Sequence[Row], config: DataConfig) -> pandas.DataFrame:
    """Return one line of features per row; those of the text are empty for rows that are in neither split."""
    num_rows = len(rows)
    is_split = [row.split in ("train", "eval") for row in rows]
    labels: list[str | None] = [None] * num_rows
    if config.task == "labels":
        names: dict[str, str] = {}  # one text for each label, whatever the number of rows
        labels = [
            names.setdefault(label := _label(row), label) if is_in_split else None
            for row, is_in_split in zip(rows, is_split, strict=True)
        ]
    train_labels = {label for row, label in zip(rows, labels, strict=True) if row.split == "train"}

    def flags(values: Iterable[bool]) -> NDArray[np.bool_]:
        return np.fromiter(values, bool, num_rows)

    def numbers(values: Iterable[int]) -> NDArray[np.float64]:
        return np.where(is_split, np.fromiter(values, np.float64, num_rows), np.nan)

    # The first evaluation row of each prompt, so that their sum is the number of prompts.
    first_rows = {row.prompt_id: row for row in reversed(rows) if row.split == "eval"}
    columns: dict[str, Any] = {
        "bad": flags(bool(row.reason) and row.reason not in NOT_BAD for row in rows),
        "duplicate": flags(row.reason == "exact_duplicate" for row in rows),
        "in_train": flags(row.split == "train" for row in rows),
        "new_prompt": flags(row is first_rows.get(row.prompt_id) for row in rows),
        "tokens": numbers(row.tokens for row in rows),
        "supervised_tokens": numbers(row.supervised_tokens for row in rows),
        "label": labels,
        "label_untrained": [label not in train_labels if label else None for label in labels],
    }

    columns |= {name: flags(name in row.hits for row in rows) for name in _judged_checks(config)}
    return pandas.DataFrame(columns)


def _judged_checks(config: DataConfig) -> list[str]:
    """Return the checks of texts that warn or refuse; rows that others keep out are counted with the bad rows."""
    return [name for name, severity in config.checks.items() if severity in ("warn", "refuse")]


def _check_limits(config: DataConfig) -> list[Expectation]:
    total = gxe.ExpectColumnSumToBeBetween
    return [
        _between(name, f"rows with {LOOKED_FOR[name]}", total, name, None, 0, config.checks[name] == "refuse")
        for name in _judged_checks(config)
    ]


def _row_limits(config: DataConfig) -> list[Expectation]:
    """Return the limits on numbers and fractions of rows; each has the name of its knob."""
    # The mean of a column of flags is a fraction of the rows, its sum is a number of rows.
    total, fraction, at_least = (
        gxe.ExpectTableRowCountToBeBetween, gxe.ExpectColumnMeanToBeBetween, gxe.ExpectColumnSumToBeBetween
    )  # fmt: skip

    max_bad, max_repeated = config.max_quarantined_fraction, config.max_duplicates_fraction
    limits = [
        ("rows_read", "rows read", total, None, 1, None),
        ("max_quarantined_fraction", "share of rows that are bad", fraction, "bad", None, max_bad),
        ("max_duplicates_fraction", "share of rows that repeat another", fraction, "duplicate", None, max_repeated),
        ("min_train_rows", "rows to train on", at_least, "in_train", config.min_train_rows, None),
        _prompt_limit(config, at_least),
    ]

    return [_between(name, text, kind, column, low, high, True) for name, text, kind, column, low, high in limits]


def _prompt_limit(config: DataConfig, at_least: Any) -> tuple[str, str, Any, str, int, None]:
    # `min_eval_prompts` is what the line's own evaluation needs, and a lab's decides about nothing that ships.
    if config.judge_fraction is not None:
        return "judge_fraction", "different prompts to judge by", at_least, "new_prompt", MIN_JUDGE_PROMPTS, None
    return "min_eval_prompts", "different prompts to evaluate on", at_least, "new_prompt", config.min_eval_prompts, None


def _length_limits(config: DataConfig) -> list[Expectation]:
    highest, lowest = gxe.ExpectColumnMaxToBeBetween, gxe.ExpectColumnMinToBeBetween
    return [
        _between("tokens", "longest chat, in tokens", highest, "tokens", None, config.max_length_tokens, True),
        _between("supervised_tokens", "fewest tokens to learn", lowest, "supervised_tokens", 1, None, True),
    ]


def _label_limits(split_rows: Sequence[Row]) -> list[Expectation]:
    counts = Counter(_label(row) for row in split_rows)
    repeated = sorted(label for label, count in counts.items() if count > 1)
    max_labels = len(split_rows) // 2

    unique, total = gxe.ExpectColumnUniqueValueCountToBeBetween, gxe.ExpectColumnSumToBeBetween
    expectations = [
        _between(
            "labels",
            "different labels; more than half as many as rows are free text, for which data.task is text",
            unique,
            "label",
            2,
            max_labels,
            True,
        ),
        _between("labels_untrained", "rows whose label is never trained on", total, "label_untrained", None, 0),
    ]

    # Where no label is repeated, the first expectation refuses the data anyway.
    if repeated:
        settings = {"column": "label", "value_set": repeated}
        text = "percent of rows whose label occurs once"
        expectations.append(Expectation("labels_once", text, gxe.ExpectColumnValuesToBeInSet, settings, high=0))
    return expectations


def _between(
    name: str, text: str, kind: Any, column: str | None, low: Limit, high: Limit, refuses: bool = False
) -> Expectation:
    settings = {"column": column} if column else {}
    bounds = {key: value for key, value in (("min_value", low), ("max_value", high)) if value is not None}
    return Expectation(name, text, kind, {**settings, **bounds}, refuses, low, high)


def _to_finding(expectation: Expectation, result: Any) -> Finding:
    # `exception_info` is one record, or one record per metric; both forms occur.
    failures = [result.exception_info, *(v for v in result.exception_info.values() if isinstance(v, dict))]
    for failure in failures:
        if failure.get("raised_exception"):
            raise UsageError(
                f"the expectation {expectation.name} could not be computed ({failure['exception_message']}); "
                "this says nothing about the data"
            )

    observed = result.result.get("observed_value", result.result.get("unexpected_percent"))
    # A NumPy number becomes a Python one, which JSON can hold.
    observed = observed.item() if hasattr(observed, "item") else observed
    outcome: Outcome = "met" if result.success else "refuse" if expectation.refuses else "warn"
    return Finding(expectation.name, expectation.text, observed, expectation.low, expectation.high, outcome)


def _label(row: Row) -> str:
    return conversations.answer_of(row.messages)
