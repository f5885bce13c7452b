"""The pages of all lines and of one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_retrain.core import html
from qlora_retrain.core.html import Html
from qlora_retrain.core.html_intervals import IntervalPoint, IntervalValue, interval_chart
from qlora_retrain.pipeline.version_summary import MAX_VERSIONS, LineSummary, Measurement, VersionSummary
from qlora_retrain.runtimes.airflow.ui import pages
from qlora_retrain.runtimes.airflow.ui.moves import MAX_REASON_CHARACTERS, MOVE_DAG, MoveRun
from qlora_retrain.runtimes.airflow.ui.pages import Urls
from qlora_retrain.storage.registry import LATEST, PRODUCTION, Alias

_NOTHING = "-"
_PASSED = "pass"


@dataclass(frozen=True, slots=True)
class MoveRights:
    """What a user may do with the DAG that moves aliases: start its runs, and watch them."""

    may_start: bool
    may_watch: bool


def lines_page(lines: Sequence[LineSummary], urls: Urls) -> str:
    """Render the list of lines, with the version in production of each."""
    rows = []
    for line in lines:
        production, latest = (line.aliases.get(name) for name in (PRODUCTION, LATEST))
        entry = line.version(production.version if production else None)
        rows.append(
            (
                pages.link(urls.line(line.line), line.line),
                _version_link(line.line, production, urls),
                verdict_cell(entry.verdict[0]) if entry else _NOTHING,
                metric_title(entry.metric) if entry else _NOTHING,
                value_cell(entry.measured if entry else None),
                clock_time(production.at) if production else _NOTHING,
                _version_link(line.line, latest, urls),
                line.num_versions,
            )
        )
    headers = ("line", PRODUCTION, "verdict", "measured by", "value", "since", LATEST, "versions")
    sentence = f"{len(lines)} line{'' if len(lines) == 1 else 's'} whose DAG you may read."
    faults = [f"{line.line}: {fault}" for line in lines for fault in line.faults]
    return pages.document("Models", sentence, html.table(headers, rows), *_fault_section(faults))


def line_page(line: LineSummary, urls: Urls, target: str | None, runs: Sequence[MoveRun], token: str) -> str:
    """Render a line: the chart over its versions, the table, and what moves its alias.

    Args:
        line: The line.
        urls: The addresses of the pages.
        target: The version to which a rollback would go back.
        runs: The newest runs of the DAG that moves aliases.
        token: The token of the form; empty for a user who may not send it.
    """
    production = line.aliases.get(PRODUCTION)
    sentence = (
        f"{PRODUCTION} names {production.version} since {clock_time(production.at)}."
        if production
        else "Not in production yet."
    )
    hidden = line.num_versions - len(line.versions)
    note = (
        [f"The newest {MAX_VERSIONS} of {line.num_versions} versions are shown, and those that aliases name."]
        if hidden > 0 and len(line.versions) >= MAX_VERSIONS
        else []
    )
    return pages.document(
        line.line,
        sentence,
        *_chart(line),
        html.section(
            "Versions",
            pages.form(urls.diff(line.line), {}, _versions_table(line, urls), _button("Compare the two"), method="get"),
            *note,
        ),
        html.section("Aliases", _alias_table(line, urls)),
        *_rollback_section(line.line, production, target, urls, token),
        *_runs_section(runs),
        *_fault_section(line.faults),
        path=[pages.link(urls.models(), "Models")],
    )


def reason_field() -> Html:
    """Return the field in which a person says why."""
    return Html(
        '<label for="reason">Reason, for the audit trail</label>\n'
        f'<input type="text" id="reason" name="reason" required maxlength="{MAX_REASON_CHARACTERS}" autocomplete="off">'
    )


def verdict_cell(decision: str) -> str:
    """Return a decision for a table; everything but a pass has the warning colour."""
    return decision if decision == _PASSED else html.highlight(decision)


def value_cell(measured: Measurement | None) -> str:
    """Return a metric for a table, with its interval below it."""
    if measured is None:
        return _NOTHING
    if measured.low is None or measured.high is None:
        return f"{measured.value:.4f}"
    return html.with_interval(f"{measured.value:.4f}", f"{measured.low:.4f} to {measured.high:.4f}")


def metric_title(metric: str) -> str:
    """Return a metric's name for people."""
    return "loss, nats per token" if metric == "loss" else metric.replace("_", " ") or _NOTHING


def _chart(line: LineSummary) -> list[Html]:
    metric = next((entry.metric for entry in line.versions if entry.metric), "")
    # Another metric has another scale.
    entries = [entry for entry in reversed(line.versions) if entry.metric == metric]
    points = [
        IntervalPoint(
            label=version_time(entry.release.version)[5:],
            name=entry.release.version,
            value=_interval_value(entry.measured),
            beside=_interval_value(entry.best_before),
        )
        for entry in entries
    ]
    if not metric:
        return []
    better = "less is better" if metric == "loss" else "more is better"
    chart = interval_chart(points, f"{metric_title(metric)}; {better}", ("the version", "the best version before"))
    note = "Both values of a version are those of its own run, on the same evaluation rows; other runs have others."
    return [html.section("Over the versions", chart, note)]


def version_time(stamp: str) -> str:
    """Return the time with which a version's name begins: `2026-01-31 23:59`."""
    return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]} {stamp[9:11]}:{stamp[11:13]}"


def clock_time(at: str) -> str:
    """Return a time of an alias for people: `2026-01-31 23:59:59 UTC`."""
    return at.replace("T", " ").replace("+00:00", " UTC")


def _interval_value(measured: Measurement | None) -> IntervalValue | None:
    return None if measured is None else IntervalValue(measured.value, measured.low, measured.high)


def _versions_table(line: LineSummary, urls: Urls) -> Html:
    rows = [_version_row(line, i, entry, urls) for i, entry in enumerate(line.versions)]
    headers = ("version", "aliases", "evaluated", "merged", "measured by", "value", "best before", "first", "second")
    return html.table(headers, rows)


def _version_row(line: LineSummary, i: int, entry: VersionSummary, urls: Urls) -> tuple[object, ...]:
    version = entry.release.version
    return (
        pages.link(urls.version(line.line, version), version),
        ", ".join(line.alias_names(version)) or _NOTHING,
        verdict_cell(entry.verdict[0]),
        verdict_cell(entry.merged_verdict[0]),
        metric_title(entry.metric),
        value_cell(entry.measured),
        value_cell(entry.best_before),
        # The newest one and the one before it are what most people compare.
        pages.radio("a", version, f"compare {version} as the first", is_checked=i == min(1, len(line.versions) - 1)),
        pages.radio("b", version, f"compare {version} as the second", is_checked=i == 0),
    )


def _alias_table(line: LineSummary, urls: Urls) -> Html:
    rows = [
        (name, _version_link(line.line, state, urls), state.generation, clock_time(state.at), state.actor, state.reason)
        for name, state in sorted(line.aliases.items())
    ]
    return html.table(("alias", "version", "moves", "since", "by", "reason"), rows)


def _rollback_section(line: str, production: Alias | None, target: str | None, urls: Urls, token: str) -> list[Html]:
    if not token or production is None or target is None:
        return []
    fields = {"action": "rollback", "version": target, "from_version": production.version, "token": token}
    text = (
        f"{PRODUCTION} goes back from {production.version} to {target}. What it leaves is rejected: no run "
        "promotes the same content again."
    )
    button = _button(f"Roll back to {target}", is_caution=True)
    return [html.section("Roll back", text, pages.form(urls.move(line), fields, reason_field(), button))]


def _runs_section(runs: Sequence[MoveRun]) -> list[Html]:
    if not runs:
        return []
    rows = [(run.at, run.action, run.version, run.user, run.state, run.run_id) for run in runs]
    table = html.table(("started, UTC", "action", "version", "by", "state", f"run of {MOVE_DAG}"), rows)
    return [Html(f'<div id="moves">{html.section("Moves", table, "The log of its task says why a run failed.")}</div>')]


def _fault_section(faults: Sequence[str]) -> list[Html]:
    return [html.section("What cannot be shown", html.bullets(faults))] if faults else []


def _version_link(line: str, state: Alias | None, urls: Urls) -> str:
    return pages.link(urls.version(line, state.version), state.version) if state else _NOTHING


def _button(text: str, *, is_caution: bool = False) -> Html:
    return Html(f"<p><button{' class=caution' if is_caution else ''}>{html.join(text)}</button></p>")
