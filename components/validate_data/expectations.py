"""The limits of the data gate, checked by Great Expectations over one flat frame of features, one row an example.

The frame holds counts, lengths and flags; text never enters it, a label only where labels are a closed set. Severity
`critical` refuses the data, `warning` is shown. An expectation that cannot be computed is an error, not bad data.
"""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas

from components.validate_data.checks import NOT_BAD, Row
from qlora_retrain.config.sections import DataConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # some versions report usage over the network
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports modules that Python 3.11 deprecates
    import great_expectations
    from great_expectations.data_context.types.base import ProgressBarsConfig

X = great_expectations.expectations
Outcome = Literal["met", "warn", "refuse"]
Limit = float | int | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One expectation with what was observed and what follows."""

    name: str
    expectation: str
    observed: float | int | None
    low: Limit
    high: Limit
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Expected:
    """An expectation before it is checked; `kind` is Great Expectations' class."""

    name: str
    text: str
    kind: Any
    settings: Mapping[str, object]
    refuses: bool = False
    low: Limit = None
    high: Limit = None


def judge(rows: Sequence[Row], config: DataConfig) -> list[Finding]:
    """Every expectation's finding, in a fixed order.

    Raises:
        UsageError: If an expectation could not be computed.
    """
    kept = [row for row in rows if row.split in ("train", "eval")]
    expected = _limits(config)
    if kept:  # Great Expectations finds nothing wrong with a column of no values
        expected += _lengths(config) + (_labels(kept) if config.task == "labels" else [])
    context = great_expectations.get_context(mode="ephemeral")
    suite = great_expectations.ExpectationSuite(name="limits")
    for e in expected:
        severity = "critical" if e.refuses else "warning"
        suite.add_expectation(e.kind(**e.settings, severity=severity, meta={"name": e.name}))
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    asset = context.data_sources.add_pandas("rows").add_dataframe_asset("features")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": features(rows, config)})
    results = {r.expectation_config.meta["name"]: r for r in batch.validate(context.suites.add(suite)).results}
    return [_finding(e, results[e.name]) for e in expected]


def features(rows: Sequence[Row], config: DataConfig) -> pandas.DataFrame:
    """One row an example read; features of the text are empty where the row was not kept."""
    kept = [row if row.split in ("train", "eval") else None for row in rows]
    labels = [_label(row) if row and config.task == "labels" else None for row in kept]
    trained = {label for row, label in zip(rows, labels, strict=True) if row.split == "train"}
    spellings = Counter(label.casefold() for label in {label for label in labels if label is not None})
    columns = {
        "bad": [bool(row.reason) and row.reason not in NOT_BAD for row in rows],
        "duplicate": [row.reason == "exact_duplicate" for row in rows],
        "in_train": [row.split == "train" for row in rows],
        "in_eval": [row.split == "eval" for row in rows],
        "turns": [len(row.messages) if row else None for row in kept],
        "has_system": [row.messages[0]["role"] == "system" if row else None for row in kept],
        "prompt_chars": [_chars(chat.prompt_of(row.messages)) if row else None for row in kept],
        "answer_chars": [len(chat.answer_of(row.messages)) if row else None for row in kept],
        "tokens": [row.tokens if row else None for row in kept],
        "supervised_tokens": [row.supervised_tokens if row else None for row in kept],
        "replacement_characters": [_count(row, "\ufffd") if row else None for row in kept],
        "unprintable_share": [_unprintable(row) if row else None for row in kept],
        "label": labels,
        "label_misspelt": [spellings[label.casefold()] > 1 if label else None for label in labels],
        "label_untrained": [label not in trained if label else None for label in labels],
    }
    return pandas.DataFrame(columns)


def _limits(config: DataConfig) -> list[Expected]:
    total, share, least = X.ExpectTableRowCountToBeBetween, X.ExpectColumnMeanToBeBetween, X.ExpectColumnSumToBeBetween
    wanted = [
        ("rows_read", "rows read", total, None, 1, None),
        ("max_quarantined", "share of rows that are bad", share, "bad", None, config.max_quarantined),
        ("max_duplicates", "share of rows that repeat another", share, "duplicate", None, config.max_duplicates),
        ("min_train_rows", "rows to train on", least, "in_train", config.min_train_rows, None),
        ("min_eval_rows", "rows to evaluate on", least, "in_eval", config.min_eval_rows, None),
    ]
    return [_between(name, text, kind, column, low, high, True) for name, text, kind, column, low, high in wanted]


def _lengths(config: DataConfig) -> list[Expected]:
    highest, lowest = X.ExpectColumnMaxToBeBetween, X.ExpectColumnMinToBeBetween
    few = {"mostly": 0.99}
    return [
        _between("tokens", "longest chat, in tokens", highest, "tokens", None, config.max_length_tokens, True),
        _between("supervised_tokens", "fewest tokens to learn", lowest, "supervised_tokens", 1, None, True),
        Expected(
            "replacement_characters",
            "percent of rows with U+FFFD, the mark of a wrong encoding",
            X.ExpectColumnValuesToBeBetween,
            {"column": "replacement_characters", "max_value": 0, **few},
            high=1,
        ),
        Expected(
            "unprintable_share",
            "percent of rows with more than 5 % control characters",
            X.ExpectColumnValuesToBeBetween,
            {"column": "unprintable_share", "max_value": 0.05, **few},
            high=1,
        ),
    ]


def _labels(kept: Sequence[Row]) -> list[Expected]:
    counts = Counter(_label(row) for row in kept)
    repeated = sorted(label for label, count in counts.items() if count > 1)
    most, unique, total = len(kept) // 2, X.ExpectColumnUniqueValueCountToBeBetween, X.ExpectColumnSumToBeBetween
    expected = [
        _between(
            "labels",
            "different labels; more than half as many as rows are free text, for which data.task is text",
            unique,
            "label",
            2,
            most,
            True,
        ),
        _between("labels_misspelt", "rows whose label differs from another by case", total, "label_misspelt", None, 0),
        _between("labels_untrained", "rows whose label is never trained on", total, "label_untrained", None, 0),
    ]
    if repeated:
        settings = {"column": "label", "value_set": repeated}
        text = "percent of rows whose label occurs once"
        expected.append(Expected("labels_once", text, X.ExpectColumnValuesToBeInSet, settings, high=0))
    return expected


def _between(
    name: str, text: str, kind: Any, column: str | None, low: Limit, high: Limit, refuses: bool = False
) -> Expected:
    settings = {"column": column} if column else {}
    bounds = {key: value for key, value in (("min_value", low), ("max_value", high)) if value is not None}
    return Expected(name, text, kind, {**settings, **bounds}, refuses, low, high)


def _finding(expected: Expected, result: Any) -> Finding:
    failures = [result.exception_info, *(v for v in result.exception_info.values() if isinstance(v, dict))]
    for failure in failures:
        if failure.get("raised_exception"):
            raise UsageError(
                f"the expectation {expected.name} could not be computed ({failure['exception_message']}); "
                "this says nothing about the data"
            )
    observed = result.result.get("observed_value", result.result.get("unexpected_percent"))
    observed = observed.item() if hasattr(observed, "item") else observed
    outcome: Outcome = "met" if result.success else "refuse" if expected.refuses else "warn"
    return Finding(expected.name, expected.text, observed, expected.low, expected.high, outcome)


def _label(row: Row) -> str:
    return chat.answer_of(row.messages)


def _chars(turns: Sequence[chat.Message]) -> int:
    return sum(len(turn["content"]) for turn in turns)


def _count(row: Row, character: str) -> int:
    return sum(turn["content"].count(character) for turn in row.messages)


def _unprintable(row: Row) -> float:
    characters = "".join(turn["content"] for turn in row.messages)
    return sum(unicodedata.category(c) == "Cc" and c not in "\n\r\t" for c in characters) / len(characters)
