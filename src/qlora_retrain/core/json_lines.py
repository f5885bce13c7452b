r"""JSON lines, one JSON value on each line: the only reader and the only writer of them in this project.

A line ends at `\n` and nowhere else. `str.splitlines` also cuts at U+2028, U+2029, U+0085 and control characters, which
text may hold, and a text file that is opened without `newline` cuts at `\r`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from qlora_retrain.core.errors import IntegrityError

# JSON may hold these three as they are. They are escaped, so that tools which take them for line ends read whole rows.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "\u0085\u2028\u2029"}


def split_lines(text: str) -> list[str]:
    r"""Return the lines of a text without their ends, `\n` or `\r\n`; the last line may have no end."""
    lines = text.split("\n")
    # What follows the last line's end is no line.
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def iter_lines(
    stream: IO[bytes], encoding: str = "utf-8-sig", line_end: Literal["\n", "\r"] = "\n"
) -> Iterator[tuple[int, str]]:
    r"""Yield each line with its number from 1, without its end, `\n` or `\r\n`.

    Args:
        stream: The file's bytes; it is closed in the end.
        encoding: The default also takes a byte order mark away.
        line_end: `\r` for files of systems where that alone ends a line.

    Raises:
        UnicodeDecodeError: For bytes that are not of the encoding.
    """
    with io.TextIOWrapper(stream, encoding=encoding, newline=line_end) as text:
        for number, line in enumerate(text, 1):
            yield number, line.removesuffix(line_end).removesuffix("\r")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line of a UTF-8 file that is not blank, with its number from 1.

    Raises:
        UnicodeDecodeError: For bytes that are not UTF-8.
    """
    with path.open("rb") as stream:
        for number, line in iter_lines(stream):
            if line.strip():
                yield number, line


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the object on each line of a file that this project wrote, with the line's number from 1.

    Raises:
        IntegrityError: For a line that is no JSON object, or bytes that are not UTF-8.
    """
    number = 0
    try:
        for number, line in read_lines(path):
            value = json.loads(line)
            if not isinstance(value, dict):
                raise IntegrityError(f"{path.name}:{number}: expected a JSON object, found {type(value).__name__}")
            yield number, value
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path.name}: the file is not UTF-8: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path.name}:{number}: the line is not JSON: {error}") from error


def dumps(value: Mapping[str, Any]) -> str:
    """Return the object as JSON on one line, whatever its texts hold; without the line's end."""
    return json.dumps(value, ensure_ascii=False).translate(_ESCAPES)


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one object a line; the same records give the same bytes on every system."""
    # Half a surrogate pair cannot be written in UTF-8. As `\\ud800` it is the same text in JSON.
    with path.open("w", encoding="utf-8", newline="\n", errors="backslashreplace") as out:
        for record in records:
            out.write(dumps(record) + "\n")
