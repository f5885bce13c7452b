"""Render the page of the data gate (`report.html`) from its numbers, without rows' text."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

from components.validate_data.checks import LOOKED_FOR, REASONS
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
_SIDES = ("train", "eval", "golden")


def report_page(profile: dict[str, Any], sentence: str) -> str:
    """Render the profile as a page; `sentence` is the decision at its top."""
    blocks = [
        *_section("Look at these first", _attention(profile)),
        html.section("From the files to the data set", _funnel(profile), *explain_evidence(profile)),
        *_section("Rows that were kept out", _reasons(profile)),
        html.section("Checks of what rows say", _checks(profile)),
        html.section(
            "Lengths",
            html.bar_chart(
                profile["length_histogram"],
                "number of chats by length in tokens, train and eval; longer than "
                f"{profile['settings']['max_length_tokens']:,} tokens is kept out",
            ),
            _lengths(profile),
            *([describe_length_limits(profile["too_long"])] if profile["too_long"] else []),
        ),
        *_section("Labels", _labels(profile)),
        *_section("Labels that are probably wrong", _suspects(profile)),
        *_section("Languages", _languages(profile)),
        *_section("Drift", _drift(profile)),
        html.section("Limits", _expectations(profile)),
        *_noticed(profile),
        html.section("How chats are written", html.key_value_table(_chat(profile))),
        html.section("Files", html.table(("file", "rows"), list(profile["files"].items()))),
        html.section("Settings", html.key_value_table(_settings(profile))),
    ]
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


def _section(heading: str, block: html.Html | None) -> list[html.Html]:
    return [html.section(heading, block)] if block else []


def _attention(profile: dict[str, Any]) -> html.Html | None:
    """Return every limit that is broken and every warning, so that nobody has to look for them in the tables."""
    rows: list[tuple[object, ...]] = [
        (html.highlight(e["outcome"]), e["expectation"], e["observed"], _range(e["low"], e["high"]))
        for e in sorted(profile["expectations"], key=lambda e: str(e["outcome"]))
        if e["outcome"] != "met"
    ]
    rows += [(html.highlight("warn"), text, None, "") for text in profile["warnings"]]
    return html.table(("", "what", "observed", "limit"), rows) if rows else None


def _funnel(profile: dict[str, Any]) -> html.Html:
    """Return bars from the rows that were read, over what was taken out for each reason, to the sides."""
    rows = profile["rows"]
    steps = {"read": rows["read"]}
    notes = {}
    for reason, entry in profile["reasons"].items():
        name = f"- {reason}"
        steps[name], notes[name] = entry["rows"], f"first: {entry['first']}"
    if beyond := rows["eval_beyond_max_eval_rows"]:
        steps["- beyond max_eval_rows"] = beyond
    return html.bar_chart(steps | {side: rows[side] for side in _SIDES}, "number of rows", notes)


def _expectations(profile: dict[str, Any]) -> html.Html:
    limits = [
        (
            e["expectation"],
            e["observed"],
            _range(e["low"], e["high"]),
            e["outcome"] if e["outcome"] == "met" else html.highlight(e["outcome"]),
        )
        for e in profile["expectations"]
    ]
    return html.table(("expectation", "observed", "limit", "outcome"), limits)


def _reasons(profile: dict[str, Any]) -> html.Html | None:
    # A line of this table is about many rows, so general words replace the field's name and the limit.
    reasons = [
        (reason, REASONS[reason].format(field="the chat", limit="the limit"), entry["rows"], entry["first"])
        for reason, entry in profile["reasons"].items()
    ]
    return html.table(("reason", "meaning", "rows", "first row"), reasons) if reasons else None


def _checks(profile: dict[str, Any]) -> html.Html:
    rows = [
        (
            name,
            LOOKED_FOR[name],
            html.highlight(entry["severity"]) if entry["rows"] else entry["severity"],
            entry["rows"],
            entry["first"] or "",
        )
        for name, entry in sorted(profile["checks"].items(), key=lambda item: -item[1]["rows"])
    ]
    return html.table(("check", "looks for", "does", "rows", "first row"), rows)


def _labels(profile: dict[str, Any]) -> html.Html | None:
    """Return bars of the labels, the most frequent first, each with its sides and the reference's rows."""
    labels = profile["labels"]
    if not labels:
        return None
    before = (profile["reference"] or {}).get("labels", {})
    totals, notes = {}, {}
    for name, sides in sorted(labels["rows"].items(), key=lambda item: (-sum(item[1].values()), item[0])):
        totals[name] = sum(sides.values())
        notes[name] = ", ".join(f"{side} {sides[side]:,}" for side in _SIDES)
        notes[name] += f", before {before[name]:,}" if name in before else ""
    caption = f"{labels['different']} different labels; the {labels['once']} that occur only once are not shown"
    return html.bar_chart(totals, caption, notes)


def _suspects(profile: dict[str, Any]) -> html.Html | None:
    rows = [(s["location"], s["label"], s["suggestion"], s["probability"]) for s in profile["suspect_labels"]]
    caption = "the most probable ones, by a classifier that has not seen the row"
    headers = ("row", "its label", "more likely", "probability that it is wrong")
    return html.table(headers, rows, caption) if rows else None


def _languages(profile: dict[str, Any]) -> html.Html | None:
    """Return bars of the languages that were guessed, or of those that the data states, or of scripts."""
    stated = profile["distributions"]["language"]
    languages = profile["languages"] or dict(sorted(stated.items(), key=lambda item: (-item[1], item[0])))
    return html.bar_chart(languages, "number of rows by language, train and eval") if languages else None


def _drift(profile: dict[str, Any]) -> html.Html | None:
    reference = profile["reference"]
    if not reference or not reference["drift"]:
        return None
    limit = reference["max_drift_psi"]
    caption = f"population stability index beyond chance, against the data of {reference['version']}; limit {limit:g}"
    notes = {
        d["what"]: ", ".join(f"{category} {before:.1%} to {now:.1%}" for category, before, now in d["moved"])
        for d in reference["drift"]
    }
    return html.bar_chart(
        {d["what"]: d["beyond_chance"] for d in reference["drift"]} | {"limit": limit}, caption, notes
    )


def _noticed(profile: dict[str, Any]) -> list[html.Html]:
    """Return what was recognised, and what may be wrong although it refuses nothing."""
    row_warnings = [
        (code, describe_row_warning(code), entry["rows"], entry["first"])
        for code, entry in profile["row_warnings"].items()
    ]
    tables = {
        "What was taken as the chat": (("source and file", "layout"), list(profile["layouts"].items())),
        "Columns that nothing reads": (("source and column", "rows"), list(profile["unread_columns"].items())),
        "Warnings about rows": (("code", "meaning", "rows", "first row"), row_warnings),
    }
    return [html.section(title, html.table(headers, rows)) for title, (headers, rows) in tables.items() if rows]


def _lengths(profile: dict[str, Any]) -> html.Html:
    rows = [(name, *(profile[side].get(name) for side in _SIDES)) for name in profile["train"]]
    return html.table(("", *_SIDES), rows)


def _chat(profile: dict[str, Any]) -> dict[str, str]:
    return {
        name: "; ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in profile["chat"].items()
        if value
    }


def _settings(profile: dict[str, Any]) -> dict[str, object]:
    """Return the settings that the data set depends on, without empty ones."""
    settings = {
        name: ", ".join(f"{key}: {item}" for key, item in value.items()) if isinstance(value, dict) else value
        for name, value in profile["settings"].items()
    }
    return {name: value for name, value in settings.items() if value not in (None, "", [])}


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
