"""List on the model card what each export of the version is, what it costs, and whether its answers end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.publish import markdown

# The name of the metric in a certificate. The module that computes it needs torch, which is not where a step publishes.
_ANSWERS_ENDED = "answers_ended"


def export_lines(certificate: Mapping[str, Any]) -> list[str]:
    """Return the section of the model card; nothing where only the model in 16 bits ships."""
    exports: Mapping[str, Mapping[str, Any]] = certificate.get("exports", {})
    if len(exports) < 2:
        return []
    rows = [
        markdown.row(
            name,
            "model/" if export["path"] == "." else f"model/{export['path']}",
            f"{export['size_bytes'] / 2**20:.1f}",
            _number(export.get("loss")),
            _cost(export),
            _share(export.get(_ANSWERS_ENDED)),
        )
        for name, export in exports.items()
    ]
    notes = [
        f"- {name}: {markdown.inline(note)}" for name, export in exports.items() for note in export.get("notes", ())
    ]
    return [
        "## Exports",
        "",
        "Each was scored as it lies in the version, on the rows that certify; the cost is against the unmerged model.",
        "",
        "| form | file | MiB | loss (nats per token) | cost in nats, with its interval | answers that end |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *([*notes, ""] if notes else []),
    ]


def _cost(export: Mapping[str, Any]) -> str:
    if not isinstance(export.get("cost"), int | float):
        return "-"
    return f"{export['cost']:+.4f} ({_number(export.get('cost_low'))} to {_number(export.get('cost_high'))})"


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "-"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
