"""Compute the numbers of the data gate (`profile.json`), without rows' text; `report.py` renders their page.

Labels are shown where they are a closed set, and only those that occur twice: a label that occurs once may be any text.
The field names of the profile are published with every version: later releases compare their data with it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from components.validate_data.checks import NOT_BAD, Row
from components.validate_data.gate_rows import GateRows
from components.validate_data.language_checks import MIN_FRACTION
from components.validate_data.lengths import count_lengths
from components.validate_data.redaction import redact
from components.validate_data.replay import SOURCE, describe, used
from components.validate_data.shape import is_multi_turn, measure_shape
from components.validate_data.sizes import length_limits
from qlora_retrain.config.data import DataConfig
from qlora_retrain.evaluation import slices
from qlora_retrain.lm import conversations
from qlora_retrain.lm.chat import ChatTokenizer
from qlora_retrain.lm.chat_format import ChatFormat

if TYPE_CHECKING:
    from components.validate_data.expectations import Finding

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
MAX_SUSPECTS = 20
MAX_FIRST_ROWS = 5


def build_profile(
    gate_rows: GateRows,
    config: DataConfig,
    findings: Sequence[Finding],
    chat_format: ChatFormat,
    tokenizer: ChatTokenizer,
) -> dict[str, Any]:
    """Return all numbers of the report.

    Every row is counted once: in train, in eval, in eval beyond its limit, as bad, as a duplicate, or as kept out for
    a reserved conversation.
    """
    rows, golden = gate_rows.rows, gate_rows.golden
    train, evaluation = ([row for row in rows if row.split == side] for side in ("train", "eval"))
    reasons = Counter(row.reason for row in rows if row.reason)
    split_rows = train + evaluation
    # Where the check on labels fails, a label may be a row's free text and must not be counts.
    is_closed_set = config.task == "labels" and all(f.outcome == "met" for f in findings if f.name == "labels")
    sides = {"train": train, "eval": evaluation, "golden": golden}

    return {
        "rows": {
            "read": len(rows),
            "train": len(train),
            "eval": len(evaluation),
            "golden": len(golden),
            "eval_beyond_max_eval_rows": sum(row.split == "dropped" for row in rows),
            "quarantined": sum(count for reason, count in reasons.items() if reason not in NOT_BAD),
            "not_kept": reasons["not_kept"],
            "repeated_headers": reasons["repeated_headers"],
            "duplicates": reasons["exact_duplicate"],
            "in_golden_set": reasons["in_golden_set"],
            "in_eval_data": reasons["in_eval_data"],
            "shared_opening": reasons["shared_opening"],
            "evaluated_before": reasons["evaluated_before"],
            "near_evaluation": reasons["near_evaluation"],
            "near_duplicates": reasons["near_duplicates"],
        },
        "prompts": {side: len({row.prompt_id for row in side_rows}) for side, side_rows in sides.items()},
        "shape": measure_shape(rows, sides, is_closed_set=is_closed_set),
        "split": {
            "eval_fraction": gate_rows.eval_fraction,
            "shared_openings": None if gate_rows.shared_openings is None else len(gate_rows.shared_openings),
        },
        "files": dict(sorted(Counter(row.file for row in rows).items())),
        "layouts": {f"{name}: {file}": text for name, file, text in _by_source(gate_rows, "layouts")},
        "unread_columns": {f"{name}: {column}": count for name, column, count in _by_source(gate_rows, "unread")},
        "warnings": [f"{name}: {text}" for name, source in gate_rows.sources.items() for text in source.warnings],
        "chat": _chat_facts(chat_format, tokenizer),
        "reasons": _first_rows([row for row in rows if row.reason], lambda row: [row.reason or ""]),
        "row_warnings": _first_rows([*split_rows, *golden], lambda row: row.warnings),
        "checks": _checks([*rows, *golden], config),
        "too_long": length_limits(rows, config),
        "train": _lengths(train),
        "eval": _lengths(evaluation),
        "golden": _lengths(golden),
        "length_histogram": count_lengths(
            (row.tokens for row in rows if row.split in ("train", "eval") or row.reason == "too_long"),
            config.max_length_tokens,
        ),
        "labels": _labels(sides) if is_closed_set else None,
        "languages": dict(sorted(gate_rows.languages.items(), key=lambda item: (-item[1], item[0]))),
        "suspect_labels": [asdict(s) for s in gate_rows.suspects[:MAX_SUSPECTS]] if is_closed_set else [],
        "distributions": _distributions(split_rows, is_closed_set),
        "replay": _replay(gate_rows.replay, len(train), config) if SOURCE in gate_rows.sources else None,
        "reference": None,
        "data_pins": {},
        "settings": {name: value for name, value in config.identity().items() if name != "template"},
        "expectations": [asdict(finding) for finding in findings],
    }


def _replay(rows: Sequence[Row], num_train: int, config: DataConfig) -> dict[str, Any]:
    return describe(rows, num_train, config) | _lengths(used(rows))


def _by_source(gate_rows: GateRows, attribute: str) -> Iterator[tuple[str, str, Any]]:
    """Yield what was noticed when each source was read: the source, the file or column, and the value."""
    for name, source in gate_rows.sources.items():
        for key, value in getattr(source, attribute).items():
            yield name, key, value


def _chat_facts(chat_format: ChatFormat, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Return how chats are written; a template of the line's own is named, not counts."""
    own = chat_format.template is not None and "{" in chat_format.template
    return {
        "template": "a Jinja file of the line" if own else chat_format.template or "the tokenizer's own",
        "template_kwargs": dict(chat_format.template_kwargs),
        "template_date": chat_format.date,
        "answer_start": chat_format.answer_start,
        "generation_stops_at": list(tokenizer.stop_texts),
        "notes": list(tokenizer.notes),
    }


def _first_rows(rows: Sequence[Row], codes: Callable[[Row], Iterable[str]]) -> dict[str, dict[str, Any]]:
    """Return by code how many rows have it and where the first ones are, the most frequent code first."""
    counts: Counter[str] = Counter()
    locations: dict[str, list[str]] = {}
    for row in rows:
        for code in codes(row):
            counts[code] += 1
            if counts[code] <= MAX_FIRST_ROWS:
                locations.setdefault(code, []).append(row.location)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {code: {"rows": count, "first_rows": locations[code]} for code, count in ordered}


def _checks(rows: Sequence[Row], config: DataConfig) -> dict[str, dict[str, Any]]:
    """Return of each check that is on what it does, its threshold, and how many rows it found and where."""
    thresholds = {
        "other_languages": MIN_FRACTION,
        "label_errors": config.label_error_threshold,
        "near_evaluation": config.near_evaluation_threshold,
        "near_duplicates": config.near_duplicate_threshold,
    }
    first_rows = _first_rows(rows, lambda row: row.hits)
    nothing: dict[str, Any] = {"rows": 0, "first_rows": []}
    return {
        name: {"severity": severity, "threshold": thresholds.get(name), **first_rows.get(name, nothing)}
        for name, severity in config.checks.items()
        if severity != "off"
    }


def _lengths(rows: Sequence[Row]) -> dict[str, int | None]:
    """Return the totals and the quantiles of the rows' lengths in tokens."""
    numbers: dict[str, int | None] = {
        "tokens": sum(row.tokens for row in rows),
        "supervised_tokens": sum(row.supervised_tokens for row in rows),
        "multi_turn_rows": sum(map(is_multi_turn, rows)),
    }

    for name in ("tokens", "supervised_tokens"):
        values = sorted(getattr(row, name) for row in rows)
        for q in QUANTILES:
            # The nearest-rank method returns a value that a row has.
            numbers[f"{name}_p{q * 100:g}"] = values[max(0, math.ceil(q * len(values)) - 1)] if values else None
    return numbers


def _labels(sides: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    counts = {side: _count_labels(rows) for side, rows in sides.items()}
    total = sum(counts.values(), Counter[str]())
    repeated = {label: {side: counts[side][label] for side in sides} for label in sorted(total) if total[label] > 1}
    return {"different": len(total), "once": len(total) - len(repeated), "rows": repeated}


def _count_labels(rows: Iterable[Row]) -> Counter[str]:
    """Count the rows by label; secrets and personal data in a label are replaced by their kind."""
    counts: Counter[str] = Counter()
    for label, count in Counter(conversations.answer_of(row.messages) for row in rows).items():
        counts[redact(label)] += count
    return counts


def _distributions(split_rows: Sequence[Row], is_closed_set: bool) -> dict[str, dict[str, int]]:
    """Count the rows in each slice; the drift of later data is computed from these counts."""
    lengths: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    for row in split_rows:
        text = slices.user_text(row.messages)
        lengths[slices.length_range(text)] += 1
        languages[row.language or slices.dominant_script(text)] += 1
    distributions = {"length": lengths, "language": languages}

    if is_closed_set:
        counts = _count_labels(split_rows)
        repeated = Counter({label: count for label, count in counts.items() if count > 1})
        # Labels that occur once are counted together. By name they would be published, and each would look like drift.
        num_once = len(counts) - len(repeated)
        distributions["label"] = repeated + Counter({"(once)": num_once} if num_once else {})

    return {name: dict(sorted(counts.items())) for name, counts in distributions.items()}
