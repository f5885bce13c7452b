"""Measure the shape of the data: prompts, lengths, what is learnt, labels, and growth beside the reference.

A number beyond its usual range is a warning, so that a person looks before hours of training; only drift refuses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from components.validate_data.checks import Row
from components.validate_data.expectations import Finding, Limit, Outcome
from qlora_retrain.config.data import DataConfig
from qlora_retrain.lm import conversations

# Beyond these a person should look; each is a line in docs/data.md.
MAX_TOO_LONG_FRACTION = 0.01
MIN_SUPERVISED_FRACTION = 0.02
MAX_ROWS_PER_PROMPT = 3.0
MAX_LABEL_IMBALANCE = 100.0
MIN_GROWTH, MAX_GROWTH = 0.5, 2.0
MAX_DRIFT_PSI = 0.1  # above it a drift is no longer small; data.max_drift_psi refuses


def measure_shape(rows: Sequence[Row], sides: Mapping[str, Sequence[Row]], *, is_closed_set: bool) -> dict[str, Any]:
    """Return the numbers of the data's shape, as fractions and ratios.

    Args:
        rows: Every row that was read.
        sides: The rows of `train`, `eval` and `golden`.
        is_closed_set: Whether the answers are labels.
    """
    num_measured = sum(row.tokens > 0 or row.reason == "too_long" for row in rows)
    num_too_long = sum(row.reason == "too_long" for row in rows)
    return {
        "rows_per_prompt": {name: _ratio(len(side), len({r.prompt_id for r in side})) for name, side in sides.items()},
        "too_long_fraction": _ratio(num_too_long, num_measured),
        "supervised_fraction": {
            name: _ratio(sum(row.supervised_tokens for row in side), sum(row.tokens for row in side))
            for name, side in sides.items()
        },
        "multi_turn_fraction": {name: _ratio(sum(map(is_multi_turn, side)), len(side)) for name, side in sides.items()},
        "label_imbalance": _label_imbalance(sides["train"]) if is_closed_set else None,
    }


def is_multi_turn(row: Row) -> bool:
    """Return whether the user speaks more than once."""
    return [turn["role"] for turn in row.messages].count("user") > 1


def check_shape(shape: Mapping[str, Any], reference: Mapping[str, Any] | None, config: DataConfig) -> list[Finding]:
    """Return a finding for each number that has a usual range.

    Args:
        shape: The result of `measure_shape`.
        reference: The comparison with `data.reference_version`, where the line has one.
        config: The line's settings.
    """
    checked: list[tuple[str, str, float | None, Limit, Limit]] = [
        (
            "too_long_fraction",
            "share of rows longer than data.max_length_tokens",
            shape["too_long_fraction"],
            None,
            MAX_TOO_LONG_FRACTION,
        ),
        (
            "supervised_fraction",
            "share of the training tokens that is learnt",
            shape["supervised_fraction"]["train"],
            MIN_SUPERVISED_FRACTION,
            None,
        ),
        # Whoever names a group knows that its rows belong together.
        (
            "rows_per_prompt",
            "evaluation rows for each different prompt; only prompts count as evidence",
            None if config.group_field else shape["rows_per_prompt"]["eval"],
            None,
            MAX_ROWS_PER_PROMPT,
        ),
    ]
    if imbalance := shape["label_imbalance"]:
        text = "training rows of the most frequent label for each row of the rarest one"
        checked.append(("label_imbalance", text, imbalance["ratio"], None, MAX_LABEL_IMBALANCE))
    if reference:
        text = "rows read for each row that was read for the reference"
        checked.append(("growth", text, reference["growth"], MIN_GROWTH, MAX_GROWTH))
        psi = max((drift["beyond_chance"] for drift in reference["drift"]), default=None)
        limit = min(MAX_DRIFT_PSI, config.max_drift_psi)
        checked.append(("drift", "largest drift from the reference, PSI beyond chance", psi, None, limit))

    findings = []
    for name, text, observed, low, high in checked:
        if observed is not None:
            is_refused = name == "drift" and observed > config.max_drift_psi
            outcome: Outcome = "refuse" if is_refused else "met" if _is_within(observed, low, high) else "warn"
            findings.append(Finding(name, text, observed, low, config.max_drift_psi if is_refused else high, outcome))
    return findings


def _label_imbalance(train: Sequence[Row]) -> dict[str, float | int] | None:
    """Return how unequal the labels are; labels that occur once have a finding of their own."""
    counts = Counter(conversations.answer_of(row.messages) for row in train)
    repeated = [count for count in counts.values() if count > 1]
    if not repeated:
        return None
    most, fewest = max(repeated), min(repeated)
    return {"most_rows": most, "fewest_rows": fewest, "ratio": round(most / fewest, 6)}


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None


def _is_within(value: float, low: Limit, high: Limit) -> bool:
    return not (low is not None and value < low) and not (high is not None and value > high)
