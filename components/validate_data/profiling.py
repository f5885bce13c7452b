"""What the gate saw, as numbers (`profile.json`) and as a page (`report.html`); never a row's text.

Labels are shown where they are a closed set, and only those that occur twice: what occurs once may be anything.
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
BARS = 16


def profile(
    rows: Sequence[Row], golden: Sequence[Row], config: DataConfig, findings: Sequence[Finding]
) -> dict[str, Any]:
    """All numbers of the report; rows read = train + eval + eval beyond the limit + bad + duplicates + golden."""
    train, evaluation = ([row for row in rows if row.split == side] for side in ("train", "eval"))
    reasons = Counter(row.reason for row in rows if row.reason)
    kept = train + evaluation
    closed = config.task == "labels" and all(f.outcome == "met" for f in findings if f.name == "labels")
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
            reason: {"rows": count, "first": next(row.place for row in rows if row.reason == reason)}
            for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        },
        "train": _lengths(train),
        "eval": _lengths(evaluation),
        "golden": _lengths(golden),
        "length_histogram": _histogram([row.tokens for row in kept]),
        "labels": _labels(train, evaluation, golden) if closed else None,
        "distributions": _distributions(kept, closed),
        "expectations": [asdict(finding) for finding in findings],
    }


def page(numbers: dict[str, Any], sentence: str) -> str:
    """The profile as a page; `sentence` is the verdict."""
    reasons = [(reason, REASONS[reason].format(field="the chat", limit="the limit"), seen["rows"], seen["first"])
               for reason, seen in numbers["reasons"].items()]  # fmt: skip
    names = list(numbers["train"])
    lengths = [(name, *(numbers[side].get(name) for side in ("train", "eval", "golden"))) for name in names]
    limits = [
        (e["expectation"], e["observed"], _range(e["low"], e["high"]), e["outcome"]) for e in numbers["expectations"]
    ]
    blocks = [
        html.section("Rows", html.numbers(numbers["rows"])),
        html.section("Expectations", html.table(("expectation", "observed", "limit", "outcome"), limits)),
        html.section(
            "Kept out",
            html.table(("reason", "meaning", "rows", "first"), reasons) if reasons else "No row was kept out.",
        ),
        html.section(
            "Lengths",
            html.bar_chart(numbers["length_histogram"], "chats by their length in tokens, train and eval"),
            html.table(("", "train", "eval", "golden"), lengths),
        ),
    ]
    if labels := numbers["labels"]:
        counts = [
            (name, *(sides[side] for side in ("train", "eval", "golden"))) for name, sides in labels["rows"].items()
        ]
        caption = f"{labels['different']} different labels; {labels['once']} that occur once are not shown"
        blocks.append(html.section("Labels", html.table(("label", "train", "eval", "golden"), counts, caption)))
    blocks.append(html.section("Files", html.table(("file", "rows"), list(numbers["files"].items()))))
    return html.page("Data report", sentence, *blocks)


def _lengths(rows: Sequence[Row]) -> dict[str, int | None]:
    found: dict[str, int | None] = {
        "tokens": sum(row.tokens for row in rows),
        "supervised_tokens": sum(row.supervised_tokens for row in rows),
        "multi_turn_rows": sum(sum(turn["role"] == "user" for turn in row.messages) > 1 for row in rows),
    }
    for name in ("tokens", "supervised_tokens"):
        values = sorted(getattr(row, name) for row in rows)
        for q in QUANTILES:
            # The nearest rank: a value that a row really has.
            found[f"{name}_p{q * 100:g}"] = values[max(0, math.ceil(q * len(values)) - 1)] if values else None
    return found


def _histogram(lengths: Sequence[int]) -> dict[str, int]:
    width = max(1, math.ceil((max(lengths, default=0) + 1) / BARS))
    counts = Counter(length // width for length in lengths)
    return {f"{i * width}-{i * width + width - 1}": counts[i] for i in range(max(counts, default=-1) + 1)}


def _labels(train: Sequence[Row], evaluation: Sequence[Row], golden: Sequence[Row]) -> dict[str, Any]:
    sides = {"train": train, "eval": evaluation, "golden": golden}
    counts = {side: Counter(chat.answer_of(row.messages) for row in rows) for side, rows in sides.items()}
    total = sum(counts.values(), Counter[str]())
    shown = {label: {side: counts[side][label] for side in sides} for label in sorted(total) if total[label] > 1}
    return {"different": len(total), "once": len(total) - len(shown), "rows": shown}


def _distributions(kept: Sequence[Row], closed: bool) -> dict[str, dict[str, int]]:
    """How the kept rows fall into slices, to tell the drift of later data by; labels that occur once are one kind."""
    prompts = [slices.prompt(row.messages) for row in kept]
    found = {
        "length": Counter(map(slices.length, prompts)),
        "language": Counter(row.language or slices.script(text) for row, text in zip(kept, prompts, strict=True)),
    }
    if closed:
        counts = Counter(chat.answer_of(row.messages) for row in kept)
        repeated = Counter({label: count for label, count in counts.items() if count > 1})
        once = len(counts) - len(repeated)
        found["label"] = repeated + Counter({"(once)": once} if once else {})
    return {what: dict(sorted(counts.items())) for what, counts in found.items()}


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
