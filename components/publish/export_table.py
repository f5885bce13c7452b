"""List on the model card what each export of the version is, what it costs, and whether its answers end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from components.publish import markdown

# The name of the metric in a certificate. The module that computes it needs torch, which is not where a step publishes.
_ANSWERS_ENDED = "answers_ended"
_LORA = "gguf-lora"


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
        *_loading_lines(exports),
        "",
    ]


def _loading_lines(exports: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Say which program loads each form but the first, whose use has a section of its own."""
    if "nf4" in exports:
        yield '- nf4: `AutoModelForCausalLM.from_pretrained("model/exports/nf4")`, with bitsandbytes installed'
    if any(name.startswith("gguf-") for name in exports if name != _LORA):
        yield "- gguf: `llama-server -m FILE`, or in the file's folder `ollama create NAME -f Modelfile`"
    if _LORA in exports:
        yield (
            f"- {_LORA}: `llama-server -m BASE.gguf --lora model/{exports[_LORA]['path']}`, over a file of the "
            "base as it was before training"
        )


def _cost(export: Mapping[str, Any]) -> str:
    if not isinstance(export.get("cost"), int | float):
        return "-"
    return f"{export['cost']:+.4f} ({_number(export.get('cost_low'))} to {_number(export.get('cost_high'))})"


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "-"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
