"""Print the tables of architectures and steps as Markdown, for `docs/compatibility.md`.

Command: python -m tests.e2e.architectures.table
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.conftest import write_tiny_tokenizer
from tests.e2e.architectures.catalogue import ARCHITECTURES, SHORT_REASONS, Architecture
from tests.e2e.architectures.trial import run_trial

# A fault of the plan's check stands in the first column.
HEADINGS = {
    "quantizes": "quantizes", "packs": "packs", "trains": "trains", "evaluates": "evaluates", "merges": "merges",
    "gguf": "exports GGUF",
}  # fmt: skip


def carried_table(architectures: Iterable[Architecture]) -> str:
    """Return a Markdown table of those that the plan lets pass: a column a step."""
    lines = [
        f"| architecture | models, for example | {' | '.join(HEADINGS.values())} |",
        "|---" * (2 + len(HEADINGS)) + "|",
    ]
    for item, cells in _trials(item for item in architectures if not item.refusal):
        texts = [_escape(cells.get(column, "")) for column in HEADINGS]
        if cells["plan"] != "yes":
            texts[0] = _escape(cells["plan"])
        lines.append(f"| {code(item.name)} | {item.models} | {' | '.join(texts)} |")
    return "\n".join(lines)


def refused_table(architectures: Iterable[Architecture]) -> str:
    """Return a Markdown table of those that the plan refuses."""
    lines = ["| architecture | models, for example | refused, since the plan finds |", "|---|---|---|"]
    for item, cells in _trials(item for item in architectures if item.refusal):
        is_expected = cells["plan"].startswith("refused (12)") and item.refusal in cells["plan"]
        reason = SHORT_REASONS[item.refusal] if is_expected else cells["plan"]
        lines.append(f"| {code(item.name)} | {item.models} | {_escape(reason)} |")
    return "\n".join(lines)


def _trials(architectures: Iterable[Architecture]) -> Iterator[tuple[Architecture, dict[str, str]]]:
    """Yield the cells of each architecture."""
    with tempfile.TemporaryDirectory() as root:
        tokenizer = Path(root) / "tokenizer"
        tokenizer.mkdir()
        write_tiny_tokenizer(tokenizer)
        for number, item in enumerate(architectures):
            yield item, run_trial(item, Path(root) / str(number), tokenizer)


def _escape(cell: str) -> str:
    return cell.replace("\n", " ").replace("|", "\\|")


def code(name: str) -> str:
    """Return an architecture's name with its class as code."""
    class_name, _, form = name.partition(", ")
    return f"`{class_name}`, {form}" if form else f"`{class_name}`"


if __name__ == "__main__":
    print(carried_table(ARCHITECTURES.values()), refused_table(ARCHITECTURES.values()), sep="\n\n")
