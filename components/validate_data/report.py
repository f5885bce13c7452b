"""Render the page of the data gate (`report.html`) from its numbers, without rows' text."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

from components.validate_data.checks import REASONS
from components.validate_data.sizes import describe_length_limits
from qlora_retrain.core import html

# What the codes of `row_warnings` mean.
ROW_WARNINGS = {
    "trimmed_ends": "the template trims white space at the ends of a text, so the model never sees it",
    "end_appended": "the template writes no end after the answer, so the end-of-sequence token is appended and learnt",
    "end_from_next_turn": "the answer ends with the mark of the next turn, at which generation stops",
    "answer_start_from_history": "the answer begins where a rendered history has it, not after the generation prompt",
    "turns_after_the_last_answer": "turns after the last answer are left out, since nothing answers them",
}
_CONFIDENCE = 0.95


def report_page(profile: dict[str, Any], sentence: str) -> str:
    """Render the profile as a page; `sentence` is the decision at its top."""
    blocks = [
        html.section("Rows", html.key_value_table(profile["rows"]), *explain_evidence(profile)),
        html.section("Split", html.key_value_table(profile["split"])),
        html.section("Expectations", _expectations(profile)),
        html.section("Rows that were kept out", _reasons(profile)),
        *_noticed(profile),
        html.section(
            "Lengths",
            html.bar_chart(profile["length_histogram"], "number of chats by length in tokens, train and eval"),
            _lengths(profile),
            *([describe_length_limits(profile["too_long"])] if profile["too_long"] else []),
        ),
    ]
    if labels := profile["labels"]:
        counts = [
            (name, *(sides[side] for side in ("train", "eval", "golden"))) for name, sides in labels["rows"].items()
        ]
        caption = f"{labels['different']} different labels; the {labels['once']} that occur only once are not shown"
        blocks.append(html.section("Labels", html.table(("label", "train", "eval", "golden"), counts, caption)))
    blocks.append(html.section("How chats are written", html.key_value_table(_chat(profile))))
    blocks.append(html.section("Files", html.table(("file", "rows"), list(profile["files"].items()))))
    return html.page("Data report", sentence, *blocks)


def describe_row_warning(code: str) -> str:
    """Return what a code of a row's warning means."""
    return ROW_WARNINGS.get(code, code.replace("_", " "))


def explain_evidence(profile: dict[str, Any]) -> list[str]:
    """Return what so many prompts can prove, where the answers are labels."""
    prompts = profile["prompts"]["eval"]
    if not profile["labels"] or not prompts:
        return []
    # As `evaluation.stats` has it. That module is not imported, since a new rule of the verdict makes no new dataset.
    z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    loss = z * z / (prompts + z * z)
    return [
        f"evaluation rows of {prompts:,} different prompts can rule out no loss of accuracy below {loss:.3f} against a "
        "champion, even if both answer all rows alike; evaluate.max_loss_to_champion below that needs more prompts "
        "(data.min_eval_prompts)"
    ]


def _expectations(profile: dict[str, Any]) -> html.Html:
    limits = [
        (e["expectation"], e["observed"], _range(e["low"], e["high"]), e["outcome"]) for e in profile["expectations"]
    ]
    return html.table(("expectation", "observed", "limit", "outcome"), limits)


def _reasons(profile: dict[str, Any]) -> html.Html | str:
    # A line of this table is about many rows, so general words replace the field's name and the limit.
    reasons = [
        (reason, REASONS[reason].format(field="the chat", limit="the limit"), entry["rows"], entry["first"])
        for reason, entry in profile["reasons"].items()
    ]
    return html.table(("reason", "meaning", "rows", "first row"), reasons) if reasons else "No row was kept out."


def _noticed(profile: dict[str, Any]) -> list[html.Html]:
    """Return what was recognised, and what may be wrong although it refuses nothing."""
    row_warnings = [
        (code, describe_row_warning(code), entry["rows"], entry["first"])
        for code, entry in profile["row_warnings"].items()
    ]
    tables = {
        "What was taken as the chat": (("source and file", "layout"), list(profile["layouts"].items())),
        "Columns that nothing reads": (("source and column", "rows"), list(profile["unread_columns"].items())),
        "Warnings": (("warning",), [(text,) for text in profile["warnings"]]),
        "Warnings about rows": (("code", "meaning", "rows", "first row"), row_warnings),
    }
    return [html.section(title, html.table(headers, rows)) for title, (headers, rows) in tables.items() if rows]


def _lengths(profile: dict[str, Any]) -> html.Html:
    rows = [(name, *(profile[side].get(name) for side in ("train", "eval", "golden"))) for name in profile["train"]]
    return html.table(("", "train", "eval", "golden"), rows)


def _chat(profile: dict[str, Any]) -> dict[str, str]:
    return {
        name: "; ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in profile["chat"].items()
        if value
    }


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
