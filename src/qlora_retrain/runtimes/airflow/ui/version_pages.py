"""The page of a version, and the page that compares two versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_retrain.core import html
from qlora_retrain.core.html import Html
from qlora_retrain.pipeline.version_diff import Difference, VersionDiff
from qlora_retrain.pipeline.version_summary import VersionSummary
from qlora_retrain.runtimes.airflow.ui import pages
from qlora_retrain.runtimes.airflow.ui.model_pages import metric_title, reason_field, value_cell, version_time
from qlora_retrain.runtimes.airflow.ui.pages import Urls
from qlora_retrain.storage.registry import PRODUCTION, Alias, Release

# By the name in an address: the file among a version's own that is shown there.
REPORTS = {
    "data": "reports/data.html",
    "training": "reports/training.html",
    "evaluation": "reports/evaluation.html",
    "certificate": "reports/merge.html",
}
_OVERVIEW = "Overview"
# A recipe has some hundred settings; a source may have a hundred thousand files.
_MAX_ROWS = 200
_MIB = 2**20


def version_page(summary: VersionSummary, production: Alias | None, urls: Urls, tab: str, token: str) -> str:
    """Render a version: its overview with what promotes it, or one of its reports."""
    release = summary.release
    line, version = release.line, release.version
    paths = {file.path for file in release.files}
    names = [name for name, path in REPORTS.items() if path in paths]
    current = tab.lower() if tab.lower() in names else ""
    links = [(_OVERVIEW, urls.version(line, version))]
    links += [(name.capitalize(), urls.version(line, version, name)) for name in names]
    content: list[Html] = (
        [pages.frame(urls.version_report(line, version, current), f"{current} report of {version}")]
        if current
        else [*_overview(summary, production), *_promote_section(release, production, urls, token)]
    )
    return pages.document(
        version,
        summary.verdict[1] or "No verdict is recorded.",
        pages.tabs(links, current.capitalize() or _OVERVIEW),
        *content,
        path=[pages.link(urls.models(), "Models"), pages.link(urls.line(line), line)],
    )


def diff_page(first: Release, second: Release, diff: VersionDiff, urls: Urls) -> str:
    """Render what differs between two versions."""
    names = (first.version, second.version)
    metric_rows = [(metric_title(pair.name), value_cell(pair.first), value_cell(pair.second)) for pair in diff.metrics]
    judged = "the same rules and evaluation data" if diff.same_judgement else "different rules or evaluation data"
    sections = {
        "Recipe": diff.recipe,
        "Data": diff.data,
        "Files of the sources": diff.sources,
        "Base model": diff.base,
        "Versions it builds on": diff.versions,
        "Code of the steps": diff.code,
    }
    equal = [title.lower() for title, differences in sections.items() if not differences]
    return pages.document(
        "Two versions compared",
        f"Both were judged by {judged}.",
        html.section(
            "Metrics",
            html.table(("metric", *names), metric_rows) if metric_rows else "Neither says what was measured.",
            "Each value is that of its own run. Only a verdict compares two versions on the same rows.",
        ),
        *(_difference_section(title, differences, names) for title, differences in sections.items() if differences),
        *([html.section("Equal", f"Nothing differs in: {'; '.join(equal)}.")] if equal else []),
        path=[pages.link(urls.models(), "Models"), pages.link(urls.line(first.line), first.line)],
    )


def _overview(summary: VersionSummary, production: Alias | None) -> list[Html]:
    release = summary.release
    is_in_production = production is not None and production.version == release.version
    facts: dict[str, Any] = {
        "planned at, UTC": version_time(release.created_at),
        "run": str(release.provenance.get("run_id", "-")),
        "in production": is_in_production,
        "rejected by a rollback": production is not None and release.content_hash in production.rejected,
        "evaluation": ": ".join(filter(None, summary.verdict)),
        "certificate of the merged form": ": ".join(filter(None, summary.merged_verdict)),
        metric_title(summary.metric): value_cell(summary.measured),
        "the best version before": value_cell(summary.best_before),
        "best version from then on": release.anchor or "-",
        "content": release.content_hash[:12],
        "files": f"{len(release.files)}, {sum(file.size_bytes for file in release.files) / _MIB:,.1f} MiB",
        "signed": release.signature is not None,
    }
    numbers = [
        html.details(name, html.key_value_table({key: _plain(value) for key, value in values.items()}))
        for name, values in release.numbers.items()
        if isinstance(values, dict)
    ]
    return [html.section("What it is", html.key_value_table(facts)), html.section("Numbers of its steps", *numbers)]


def _plain(value: object) -> object:
    """Return a value that a table can show; a manifest may hold numbers that no float has."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if (is_number and -1e18 < value < 1e18) or isinstance(value, bool | None) else str(value)  # type: ignore[operator]


def _promote_section(release: Release, production: Alias | None, urls: Urls, token: str) -> list[Html]:
    """Return the form that promotes; none for who may not, and for what is in production or was rejected."""
    is_named = production is not None and production.version == release.version
    is_rejected = production is not None and release.content_hash in production.rejected
    if not token or is_named or is_rejected:
        return []
    current = production.version if production else ""
    fields = {"action": "promote", "version": release.version, "from_version": current, "token": token}
    text = f"{PRODUCTION} will name this version instead of {current or 'nothing'}."
    button = Html(f"<p><button>Promote to {PRODUCTION}</button></p>")
    return [html.section("Promote", text, pages.form(urls.move(release.line), fields, reason_field(), button))]


def _difference_section(title: str, differences: Sequence[Difference], names: tuple[str, str]) -> Html:
    rows = [(entry.name, entry.first, entry.second) for entry in differences[:_MAX_ROWS]]
    note = [f"{len(differences) - _MAX_ROWS:,} more are not shown."] if len(differences) > _MAX_ROWS else []
    return html.section(title, html.table(("", *names), rows), *note)
