"""Keep what a terminal would obey out of every log and screen.

Labels, fields' names, file names and a model's answers are texts of strangers. A control character in one of them could
move the cursor, rewrite lines that were printed before, or set a terminal's title. It is shown as its escape instead.
"""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO

# Control characters but tab and line feed; what turns the direction of a line round; halves of surrogate pairs, which
# no stream takes.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# A colour, which libraries print on their own, and the other half of a line end.
_DROPPED = re.compile("\x1b\\[[0-9;]*m|\r(?=\n)")


def escape_controls(text: str) -> str:
    r"""Return the text with each character that a terminal would obey written as its escape, such as `\x1b`.

    Colours are left out.
    """
    text = _DROPPED.sub("", text)
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


class VisibleStream:
    """A text stream that escapes control characters; every other method is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text with its control characters escaped."""
        return self._stream.write(escape_controls(text))

    def write_controls(self, text: str) -> int:
        """Write a text of this program, whose control characters are meant."""
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_controls(text: str) -> None:
    """Write a text of this program with its control characters to the standard output."""
    getattr(sys.stdout, "write_controls", sys.stdout.write)(text)
    sys.stdout.flush()


def protect_output() -> None:
    """Let the standard streams of this process escape control characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, VisibleStream):
            setattr(sys, name, VisibleStream(stream))
