"""Split the log of a container into lines."""

from __future__ import annotations

from collections.abc import Iterator


def split_lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Split a byte stream into whole lines, however its chunks are cut."""
    # A chunk may end within a line, and even within a character of it.
    remainder = b""
    for chunk in chunks:
        *complete, remainder = (remainder + chunk).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in complete)
    if remainder:
        yield remainder.decode("utf-8", "replace")
