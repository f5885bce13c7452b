"""Show the graph of steps: as a table for a terminal, and as a Mermaid flowchart."""

from __future__ import annotations

from qlora_retrain.core.graph import SOURCES, STEPS, producer, upstream_steps


def as_text() -> str:
    """Return the graph as a table for a terminal."""
    rows = [("step", "reads", "makes", "image", "gpu", "after")]
    for s in STEPS:
        reads = ", ".join(i.name + (" (tokenizer)" if i.files == "tokenizer" else "") for i in s.reads)
        rows.append((s.name, reads, s.makes, s.image, str(s.gpus), ", ".join(upstream_steps(s)) or "-"))

    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def as_mermaid() -> str:
    """Return the graph as a Mermaid flowchart, with sources as rounded boxes."""
    lines = ["flowchart LR"]
    lines += [f"  {s.name}([{s.name}])" for s in SOURCES]

    for s in STEPS:
        lines.append(f"  {s.name}[{s.name}]")
        for item in s.reads:
            maker = producer(item.name)
            origin = f"{maker.name} -- {item.name} -->" if maker else f"{item.name} -->"
            lines.append(f"  {origin} {s.name}")
    return "\n".join(lines)
