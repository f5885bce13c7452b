"""Render the page of the data gate (`report.html`) from its numbers, without rows' text.

What a person must decide about comes first: the verdict, every broken limit and warning, and where the rows went. The
page belongs to the data and the settings, whichever runs use them, so it names these and no run.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

from components.validate_data.checks import LOOKED_FOR, REASONS
from components.validate_data.report_shape import (
    percent,
    present_sides,
    show_drift,
    show_labels,
    show_languages,
    show_lengths,
    show_replay,
    show_sides,
    show_suspects,
)
from qlora_retrain.core import html

# What the codes of `row_warnings` mean.
ROW_WARNINGS = {
    "trimmed_ends": "the template trims white space at the ends of a text, so the model never sees it",
    "end_appended": "the template writes no end after the answer, so the end-of-sequence token is appended and learnt",
    "end_from_next_turn": "the answer ends with the mark of the next turn, at which generation stops",
    "answer_start_from_history": "the answer begins where a rendered history has it, not after the generation prompt",
    "turns_after_the_last_answer": "turns after the last answer are left out, since nothing answers them",
}
# How a check's threshold reads; a check without one needs no more than one place in a row.
_THRESHOLDS = {
    "other_languages": "of fewer than {:.0%} of the rows",
    "label_errors": "probability of at least {:g}",
    "near_evaluation": "similarity of at least {:g}",
    "near_duplicates": "similarity of at least {:g}",
}
_CONFIDENCE = 0.95


def report_page(profile: dict[str, Any], sentence: str) -> str:
    """Render the profile as a page; `sentence` is the decision at its top."""
    # Of a refusal each clause is a line: what is wrong, an example of it, and what to do.
    verdict, *reasons = (
        sentence.removeprefix("data ").split("; ") if sentence.startswith("data refused") else [sentence]
    )
    blocks = [
        *([html.bullets(reasons)] if reasons else []),
        *_section("Look at these first", _attention(profile)),
        html.section("From the files to the data set", _funnel(profile), *explain_evidence(profile)),
        html.section("What each side holds", show_sides(profile)),
        *_section("Replay", *show_replay(profile)),
        html.section("Rules about what rows say", *_checks(profile)),
        html.section("Lengths", *show_lengths(profile)),
        *_section("Labels", *show_labels(profile)),
        *_section("Labels that are probably wrong", show_suspects(profile)),
        *_section("Languages", show_languages(profile)),
        *_section("Drift from the reference", *show_drift(profile)),
        html.section("Limits", _expectations(profile)),
        *_noticed(profile),
        html.section("What this page is about", *_subject(profile)),
    ]
    return html.page("Data report", _upper(verdict), *blocks)


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


def _section(heading: str, *blocks: html.Html | None) -> list[html.Html]:
    present = [block for block in blocks if block is not None]
    return [html.section(heading, *present)] if present else []


def _attention(profile: dict[str, Any]) -> html.Html | None:
    """Return every limit that is broken and every warning, so that nobody has to look for them in the tables."""
    findings = sorted((e for e in profile["expectations"] if e["outcome"] != "met"), key=lambda e: str(e["outcome"]))
    items = [(e["outcome"], _describe(e, profile)) for e in findings]
    items += [("warn", f"{describe_row_warning(c)}: {_count(e, profile)}") for c, e in profile["row_warnings"].items()]
    items += [("warn", text) for text in profile["warnings"] + profile["chat"]["notes"]]
    if not items:
        return None
    lines = [html.join(html.highlight(outcome), " ", text) for outcome, text in items]
    return html.bullets(lines)


def _describe(expectation: dict[str, Any], profile: dict[str, Any]) -> str:
    """Return a sentence about a limit that is broken: of a check how many rows and where, else the two numbers."""
    name = expectation["name"]
    if check := profile["checks"].get(name):
        return f"{_upper(expectation['expectation'])} ({name}): {_count(check, profile)}"
    observed, limit = _value(expectation, "observed"), _range(expectation)
    return f"{_upper(expectation['expectation'])}: {observed}, expected {limit} ({name})"


def _count(entry: dict[str, Any], profile: dict[str, Any]) -> str:
    share = entry["rows"] / max(1, profile["rows"]["read"])
    rows = "row" if entry["rows"] == 1 else "rows"
    return f"{entry['rows']:,} {rows} ({percent(share)}), {_first(entry)}"


def _first(entry: dict[str, Any], most: int = 5) -> str:
    ending = ", ..." if entry["rows"] > most else ""
    return f"the first: {', '.join(entry['first_rows'][:most])}{ending}"


def _funnel(profile: dict[str, Any]) -> html.Html:
    """Return bars from the rows that were read, over what was taken out for each reason, to the sides."""
    rows = profile["rows"]
    steps, notes = {"read": rows["read"]}, {}
    for reason, entry in profile["reasons"].items():
        # A bar is about many rows, so general words replace the field's name and the limit.
        meaning = REASONS[reason].format(field="the row", limit=f"{profile['settings']['max_length_tokens']:,}")
        steps[reason], notes[reason] = entry["rows"], f"{_upper(meaning)}; {_first(entry, 3)}"
    if beyond := rows["eval_beyond_max_eval_rows"]:
        steps["beyond max_eval_rows"] = beyond
    out = [name for name in steps if name != "read"]
    sides = {side: rows[side] for side in present_sides(profile)}
    caption = "number of rows: what was read; in orange what was taken out, and why; what is left"
    return html.bar_chart(steps | sides, caption, notes, out=out)


def _checks(profile: dict[str, Any]) -> list[html.Html]:
    """Return the rules that found something, the most rows first, and below them those that found nothing."""
    entries = sorted(profile["checks"].items(), key=lambda item: -item[1]["rows"])
    rules = [
        (
            name,
            LOOKED_FOR[name],
            html.highlight(entry["severity"]),
            entry["rows"],
            percent(entry["rows"] / max(1, profile["rows"]["read"])),
            _threshold(name, entry),
            ", ".join(entry["first_rows"]),
        )
        for name, entry in entries
        if entry["rows"]
    ]
    others = [(name, LOOKED_FOR[name], e["severity"], _threshold(name, e)) for name, e in entries if not e["rows"]]
    off = [name for name, severity in profile["settings"]["checks"].items() if severity == "off"]
    return [
        *(
            [html.table(("rule", "finds", "does", "rows", "share", "threshold", "first rows"), rules, stack=True)]
            if rules
            else []
        ),
        *(
            [
                html.details(
                    f"{len(others)} rules found nothing",
                    html.table(("rule", "finds", "does", "threshold"), others, stack=True),
                )
            ]
            if others
            else []
        ),
        *([html.bullets([f"switched off: {', '.join(off)}"])] if off else []),
    ]


def _threshold(name: str, entry: dict[str, Any]) -> str:
    return _THRESHOLDS[name].format(entry["threshold"]) if entry["threshold"] is not None else "one place in a row"


def _expectations(profile: dict[str, Any]) -> html.Html:
    """Return every limit on the whole data; the rules above say what they found in rows."""
    limits = [
        (
            e["expectation"],
            _value(e, "observed"),
            _range(e),
            e["outcome"] if e["outcome"] == "met" else html.highlight(e["outcome"]),
            e["name"],
        )
        for e in profile["expectations"]
        if e["name"] not in profile["checks"]
    ]
    return html.table(("expectation", "observed", "limit", "outcome", "name"), limits, stack=True)


def _noticed(profile: dict[str, Any]) -> list[html.Html]:
    """Return what was recognised, and the columns that nothing reads."""
    tables = {
        "What was taken as the chat": (("source and file", "layout"), list(profile["layouts"].items())),
        "Columns that nothing reads": (("source and column", "rows"), list(profile["unread_columns"].items())),
    }
    return [html.section(title, html.table(headers, rows)) for title, (headers, rows) in tables.items() if rows]


def _subject(profile: dict[str, Any]) -> list[html.Html]:
    """Return what the data set was made of: its files, the settings, and how chats are written."""
    files = [(name, profile["files"].get(_row_file(name)), sha256) for name, sha256 in profile["data_pins"].items()]
    line = profile["settings"].get("split_seed")
    note = (
        "Every run with these files, this base model and these settings has this page; "
        "`qlora-retrain status RUN --page FILE` names a run, its line and its data."
    )
    return [
        html.bullets([*([f"line: {line} (or data.split_seed, where it is set)"] if line else []), note]),
        html.table(("file", "rows", "sha256"), files, stack=True),
        html.details("How chats are written", html.key_value_table(_chat(profile))),
        html.details("Settings (data.*)", html.key_value_table(_settings(profile))),
    ]


def _row_file(name: str) -> str:
    # Rows of `raw_data` are named without their source.
    return name.removeprefix("raw_data/")


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


def _value(expectation: dict[str, Any], key: str) -> str:
    """Return a number of an expectation: a share in percent, another as it is."""
    value = expectation[key]
    if value is None:
        return "-"
    return (
        percent(value) if "fraction" in expectation["name"] else f"{value:,.4g}" if value < 10_000 else f"{value:,.0f}"
    )


def _range(expectation: dict[str, Any]) -> str:
    low, high = (expectation[key] for key in ("low", "high"))
    if low is None and high is None:
        return "-"
    if low is None:
        return f"at most {_value(expectation, 'high')}"
    return f"at least {_value(expectation, 'low')}" + (
        "" if high is None else f", at most {_value(expectation, 'high')}"
    )


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
