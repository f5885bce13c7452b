"""Show the shape of the data on the page of the data gate: sides, lengths, labels, languages and drift."""

from __future__ import annotations

from typing import Any

from components.validate_data import language_checks
from components.validate_data.lengths import plot_lengths
from components.validate_data.replay import sentence
from components.validate_data.sizes import describe_length_limits
from qlora_retrain.core import html

SIDES = {"train": "train", "eval": "evaluation", "golden": "golden"}
_NUM_LABELS_SHOWN = 20  # the others open on a click
_QUANTILES = {"p50": "half have at most", "p95": "95% have at most", "p99": "99% have at most", "p100": "the longest"}


def show_sides(profile: dict[str, Any]) -> html.Html:
    """Return of each side how much it is, in rows, in prompts and in tokens."""
    sides = present_sides(profile)
    shape = profile["shape"]
    return html.table(
        ("side", "rows", "different prompts", "rows a prompt", "of several turns", "tokens", "learnt of these"),
        [
            (
                SIDES[side],
                profile["rows"][side],
                profile["prompts"][side],
                shape["rows_per_prompt"][side],
                percent(shape["multi_turn_fraction"][side]),
                profile[side]["tokens"],
                percent(shape["supervised_fraction"][side]),
            )
            for side in sides
        ],
        stack=True,
    )


def show_replay(profile: dict[str, Any]) -> list[html.Html]:
    """Return how many general rows train beside the line's own, and why others do not; nothing without replay data."""
    numbers = profile.get("replay")
    if not numbers:
        return []
    table = [
        ("read", numbers["read"]),
        *((f"left out: {reason}", count) for reason, count in numbers["reasons"].items()),
        ("beyond data.replay_fraction", numbers["beyond_fraction"]),
        ("train", numbers["used"]),
        *((f"of these with {name} (data.checks)", count) for name, count in numbers["warnings"].items()),
    ]
    return [html.join(sentence(numbers)), html.table(("replay rows", "number"), table)]


def show_lengths(profile: dict[str, Any]) -> list[str]:
    """Return the lengths as a plot with the limit, and their quantiles."""
    limit, too_long = profile["settings"]["max_length_tokens"], profile["too_long"]
    count = profile["reasons"].get("too_long", {}).get("rows", 0)
    share = profile["shape"]["too_long_fraction"]
    sentence = (
        f"{count:,} rows ({percent(share)}) are longer than the limit of {limit:,} tokens and are kept out; "
        + describe_length_limits(too_long)
        if too_long
        else f"No row is longer than the limit of {limit:,} tokens."
    )
    sides = present_sides(profile)
    rows = [
        (f"{unit}: {words}", *(profile[side][f"{name}_{quantile}"] for side in sides))
        for name, unit in (("tokens", "tokens of a chat"), ("supervised_tokens", "tokens that are learnt"))
        for quantile, words in _QUANTILES.items()
    ]
    table = html.table(("", *(SIDES[side] for side in sides)), rows, stack=len(sides) > 2)
    return [sentence, plot_lengths(profile["length_histogram"], limit), table]


def show_labels(profile: dict[str, Any]) -> list[html.Html | None]:
    """Return bars of the labels, the most frequent first, each with its sides and the reference's share."""
    labels = profile["labels"]
    if not labels:
        return []
    before = (profile["reference"] or {}).get("labels", {})
    sides = present_sides(profile)
    totals = {name: sum(counts.values()) for name, counts in labels["rows"].items()}
    ordered = sorted(totals, key=lambda name: (-totals[name], name))
    notes = {name: ", ".join(f"{SIDES[s]} {labels['rows'][name][s]:,}" for s in sides) for name in ordered}
    values: dict[str, float] = {name: totals[name] for name in ordered}
    caption, shares_before = "number of rows by label", None
    if before:
        # Two data sets of different sizes are compared by shares.
        total, total_before = max(1, sum(totals.values())), max(1, sum(before.values()))
        values = {name: round(100 * totals[name] / total, 2) for name in ordered}
        shares_before = {name: 100 * before.get(name, 0) / total_before for name in ordered}
        notes = {n: f"{note}; before {before.get(n, 0):,} ({shares_before[n]:.2f}%)" for n, note in notes.items()}
        caption = f"percent of the rows by label; the thin grey bars are the data of {profile['reference']['version']}"

    charts: list[html.Html | None] = []
    for names in (ordered[:_NUM_LABELS_SHOWN], ordered[_NUM_LABELS_SHOWN:]):
        chart = html.bar_chart(
            {n: values[n] for n in names}, caption, {n: notes[n] for n in names},
            before=shares_before, longest=max([0.0, *values.values(), *(shares_before or {}).values()]),
        )  # fmt: skip
        charts.append(chart if not charts else html.details(f"the other {len(names)} labels", chart))
    return [html.bullets(_label_facts(profile, before)), *(charts if len(ordered) > _NUM_LABELS_SHOWN else charts[:1])]


def _label_facts(profile: dict[str, Any], before: dict[str, int]) -> list[str]:
    labels, imbalance = profile["labels"], profile["shape"]["label_imbalance"]
    facts = [f"{labels['different']:,} different labels; {labels['once']:,} occur once and are not shown"]
    if imbalance:
        facts.append(
            f"in training the most frequent has {imbalance['most_rows']:,} rows and the rarest "
            f"{imbalance['fewest_rows']:,}: {imbalance['ratio']:.3g} to 1"
        )
    if missing := sorted(before.keys() - labels["rows"].keys() - {"(once)"}):
        named = ", ".join(missing[:10]) + (" and others" if len(missing) > 10 else "")
        facts.append(f"{len(missing):,} labels of the reference do not occur twice: {named}")
    return facts


def show_suspects(profile: dict[str, Any]) -> html.Html | None:
    """Return the rows whose label is probably wrong."""
    rows = [(s["location"], s["label"], s["suggestion"], s["probability"]) for s in profile["suspect_labels"]]
    caption = "the most probable ones, by a classifier that has not seen the row"
    headers = ("row", "its label", "more likely", "probability that it is wrong")
    return html.table(headers, rows, caption, stack=True) if rows else None


def show_languages(profile: dict[str, Any]) -> html.Html | None:
    """Return bars of the languages that were guessed, or of those that the data states, or of scripts."""
    stated = profile["distributions"]["language"]
    languages = profile["languages"] or dict(sorted(stated.items(), key=lambda item: (-item[1], item[0])))
    total = max(1, sum(languages.values()))
    notes = {name: percent(count / total) for name, count in languages.items()}
    caption = (
        "number of rows by language, training and evaluation; texts too short to tell are not counted, and where the "
        f"check only warns, no more than {language_checks.MAX_ROWS:,} rows are judged"
    )
    return html.bar_chart(languages, caption, notes) if languages else None


def show_drift(profile: dict[str, Any]) -> list[html.Html | None]:
    """Return growth and the drift of each feature beside the limit, where the line has a reference."""
    reference = profile["reference"]
    if not reference:
        return []
    facts = [f"compared with the data of {reference['version']}"]
    if reference["growth"]:
        facts.append(
            f"{profile['rows']['read']:,} rows were read; {reference['rows_read']:,} were read for the reference: "
            f"{reference['growth']:.3g} times as many"
        )
    limit = reference["max_drift_psi"]
    caption = f"population stability index beyond chance, by feature; the dashed line is the limit, {limit:g}"
    notes = {
        d["what"]: f"index {d['psi']:.3f}, {d['beyond_chance']:.3f} beyond chance; moved most: "
        + ", ".join(f"{category} {before:.1%} to {now:.1%}" for category, before, now in d["moved"])
        for d in reference["drift"]
    }
    values = {d["what"]: d["beyond_chance"] for d in reference["drift"]}
    out = [name for name, value in values.items() if value > limit]
    chart = html.bar_chart(values, caption, notes, limit=limit, out=out) if values else None
    return [html.bullets(facts), chart]


def present_sides(profile: dict[str, Any]) -> list[str]:
    """Return the sides that the data has: golden rows are not asked for."""
    return [side for side in SIDES if profile["rows"][side] or side != "golden"]


def percent(fraction: float | None) -> str:
    """Return a fraction in percent."""
    if fraction is None:
        return "-"
    return f"{fraction:.0%}" if fraction in (0, 1) else f"{fraction:.1%}" if fraction >= 0.01 else f"{fraction:.2%}"
