"""Compute the numbers of the data gate (`profile.json`) and render their page (`report.html`), without rows' text.

Labels are shown where they are a closed set, and only those that occur twice: a label that occurs once may be any text.
The field names of the profile are published with every version: later releases compare their data with it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from components.validate_data.checks import NOT_BAD, REASONS, Row
from components.validate_data.expectations import Finding
from qlora_retrain.config.sections import DataConfig
from qlora_retrain.core import html
from qlora_retrain.evaluation import slices
from qlora_retrain.lm import chat

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
NUM_BARS = 16  # bars in the histogram of lengths


def build_profile(
    rows: Sequence[Row], golden: Sequence[Row], config: DataConfig, findings: Sequence[Finding]
) -> dict[str, Any]:
    """Return all numbers of the report.

    Every row is counted once: in train, in eval, in eval beyond its limit, as bad, as a duplicate, or as golden.
    """
    train, evaluation = ([row for row in rows if row.split == side] for side in ("train", "eval"))
    reasons = Counter(row.reason for row in rows if row.reason)
    split_rows = train + evaluation
    # Where the check on labels fails, a label may be a row's free text and must not be shown.
    is_closed_set = config.task == "labels" and all(f.outcome == "met" for f in findings if f.name == "labels")

    return {
        "rows": {
            "read": len(rows),
            "train": len(train),
            "eval": len(evaluation),
            "golden": len(golden),
            "eval_beyond_max_eval_rows": sum(row.split == "dropped" for row in rows),
            "quarantined": sum(count for reason, count in reasons.items() if reason not in NOT_BAD),
            "duplicates": reasons["exact_duplicate"],
            "in_golden_set": reasons["in_golden_set"],
        },
        "files": dict(sorted(Counter(row.file for row in rows).items())),
        "reasons": {
            reason: {"rows": count, "first": next(row.location for row in rows if row.reason == reason)}
            for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        },
        "train": _lengths(train),
        "eval": _lengths(evaluation),
        "golden": _lengths(golden),
        "length_histogram": _histogram([row.tokens for row in split_rows]),
        "labels": _labels(train, evaluation, golden) if is_closed_set else None,
        "distributions": _distributions(split_rows, is_closed_set),
        "expectations": [asdict(finding) for finding in findings],
    }


def report_page(profile: dict[str, Any], sentence: str) -> str:
    """Render the profile as a page; `sentence` is the decision at its top."""
    # A line of this table is about many rows, so general words replace the field's name and the limit.
    reasons = [
        (reason, REASONS[reason].format(field="the chat", limit="the limit"), entry["rows"], entry["first"])
        for reason, entry in profile["reasons"].items()
    ]
    names = list(profile["train"])
    lengths = [(name, *(profile[side].get(name) for side in ("train", "eval", "golden"))) for name in names]
    limits = [
        (e["expectation"], e["observed"], _range(e["low"], e["high"]), e["outcome"]) for e in profile["expectations"]
    ]

    blocks = [
        html.section("Rows", html.key_value_table(profile["rows"])),
        html.section("Expectations", html.table(("expectation", "observed", "limit", "outcome"), limits)),
        html.section(
            "Rows that were kept out",
            html.table(("reason", "meaning", "rows", "first row"), reasons) if reasons else "No row was kept out.",
        ),
        html.section(
            "Lengths",
            html.bar_chart(profile["length_histogram"], "number of chats by length in tokens, train and eval"),
            html.table(("", "train", "eval", "golden"), lengths),
        ),
    ]
    if labels := profile["labels"]:
        counts = [
            (name, *(sides[side] for side in ("train", "eval", "golden"))) for name, sides in labels["rows"].items()
        ]
        caption = f"{labels['different']} different labels; the {labels['once']} that occur only once are not shown"
        blocks.append(html.section("Labels", html.table(("label", "train", "eval", "golden"), counts, caption)))
    blocks.append(html.section("Files", html.table(("file", "rows"), list(profile["files"].items()))))
    return html.page("Data report", sentence, *blocks)


def _lengths(rows: Sequence[Row]) -> dict[str, int | None]:
    """Return the totals and the quantiles of the rows' lengths in tokens."""
    numbers: dict[str, int | None] = {
        "tokens": sum(row.tokens for row in rows),
        "supervised_tokens": sum(row.supervised_tokens for row in rows),
        "multi_turn_rows": sum(sum(turn["role"] == "user" for turn in row.messages) > 1 for row in rows),
    }

    for name in ("tokens", "supervised_tokens"):
        values = sorted(getattr(row, name) for row in rows)
        for q in QUANTILES:
            # The nearest-rank method returns a value that a row has.
            numbers[f"{name}_p{q * 100:g}"] = values[max(0, math.ceil(q * len(values)) - 1)] if values else None
    return numbers


def _histogram(lengths: Sequence[int]) -> dict[str, int]:
    # A bar spans a whole number of tokens, so that its label is a range of integers.
    width = max(1, math.ceil((max(lengths, default=0) + 1) / NUM_BARS))
    counts = Counter(length // width for length in lengths)
    return {f"{i * width}-{i * width + width - 1}": counts[i] for i in range(max(counts, default=-1) + 1)}


def _labels(train: Sequence[Row], evaluation: Sequence[Row], golden: Sequence[Row]) -> dict[str, Any]:
    sides = {"train": train, "eval": evaluation, "golden": golden}
    counts = {side: Counter(chat.answer_of(row.messages) for row in rows) for side, rows in sides.items()}
    total = sum(counts.values(), Counter[str]())
    repeated = {label: {side: counts[side][label] for side in sides} for label in sorted(total) if total[label] > 1}
    return {"different": len(total), "once": len(total) - len(repeated), "rows": repeated}


def _distributions(split_rows: Sequence[Row], is_closed_set: bool) -> dict[str, dict[str, int]]:
    """Count the rows in each slice; the drift of later data is computed from these counts."""
    prompts = [slices.user_text(row.messages) for row in split_rows]
    distributions = {
        "length": Counter(map(slices.length_range, prompts)),
        "language": Counter(
            row.language or slices.dominant_script(text) for row, text in zip(split_rows, prompts, strict=True)
        ),
    }

    if is_closed_set:
        counts = Counter(chat.answer_of(row.messages) for row in split_rows)
        repeated = Counter({label: count for label, count in counts.items() if count > 1})
        # Labels that occur once are counted together. By name they would be published, and each would look like drift.
        num_once = len(counts) - len(repeated)
        distributions["label"] = repeated + Counter({"(once)": num_once} if num_once else {})

    return {name: dict(sorted(counts.items())) for name, counts in distributions.items()}


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
