"""How much a file of data may hold, so that a small one cannot take the memory of the machine.

Every row stays in memory until the gate has decided, and formats that are packed can repeat a text for nothing. The
limits are far above what people write: a row of 16 million characters is longer than any model's context.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from qlora_retrain.core.errors import UsageError

MAX_ROW_CHARACTERS = 1 << 24
# Of a JSON document whose rows lie across it, and which is therefore read as a whole.
MAX_DOCUMENT_CHARACTERS = 1 << 28
# What the files of a source may hold beside their own size. Plain text packs to a twentieth, prompts that repeat to a
# hundredth.
_FREE_CHARACTERS = 1 << 27
_MAX_EXPANSION = 250
# What a row takes in memory beside its texts, though a packed file may hold it for nothing.
MIN_ROW_CHARACTERS = 64


def max_file_characters(size_bytes: int, num_files: int) -> int:
    """Return how many characters, or unpacked bytes, a file of this size may hold, as one of so many of a source."""
    return _FREE_CHARACTERS // num_files + _MAX_EXPANSION * size_bytes


def row_too_long(location: str) -> UsageError:
    """Return the error about a row that is longer than any model reads."""
    return UsageError(
        f"{location}: a row has more than {MAX_ROW_CHARACTERS:,} characters, and no model reads so much at once; cut "
        "it into several, or take it out"
    )


def count_characters(value: object, limit: int) -> int:
    """Return the characters of all texts in a value; stop above the limit. Every other value counts as one."""
    count, pending = 0, [value]
    while pending and count <= limit:
        item = pending.pop()
        if isinstance(item, str | bytes):
            count += len(item)
        elif isinstance(item, dict):
            pending.extend(item.values())
            count += len(item)
        elif isinstance(item, list | tuple):
            pending.extend(item)
            count += len(item)
    return count


class BoundedLines:
    """The lines of a text, with their ends; a row may go over several of them."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.number = 0  # of the last line
        self._stream, self._name = stream, name
        self._remaining = MAX_ROW_CHARACTERS

    def begin_row(self) -> None:
        """Count the characters anew."""
        self._remaining = MAX_ROW_CHARACTERS

    def __iter__(self) -> Iterator[str]:
        while line := self._stream.readline(self._remaining + 1):
            self.number += 1
            self._remaining -= len(line)
            if self._remaining < 0:
                raise row_too_long(f"{self._name}:{self.number}")
            yield line


def first_lines(stream: TextIO, count: int, max_characters: int = MAX_ROW_CHARACTERS) -> list[str]:
    """Return the first lines of a text, fewer where they are long; the last one may be cut."""
    lines, remaining = list[str](), max_characters
    while len(lines) < count and remaining and (line := stream.readline(remaining)):
        lines.append(line)
        remaining -= len(line)
    return lines
