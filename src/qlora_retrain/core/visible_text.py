"""Keep what a terminal would obey out of every log and screen.

Labels, fields' names, file names and a model's answers are texts of strangers. A control character in one of them could
move the cursor, rewrite lines that were printed before, or set a terminal's title. It is shown as its escape instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from qlora_retrain.core.errors import TryAgain

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
    """A text stream that escapes control characters; every other method is the stream's own.

    Args:
        stream: The stream.
        is_result: Whether the program has failed that cannot write there. Notes that have no room stop nothing.
    """

    def __init__(self, stream: TextIO, *, is_result: bool = True) -> None:
        self._stream, self._is_result = stream, is_result

    def write(self, text: str) -> int:
        """Write the text with its control characters escaped."""
        return self.write_controls(escape_controls(text))

    def write_controls(self, text: str) -> int:
        """Write a text of this program, whose control characters are meant."""
        with self._errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what the stream holds back."""
        with self._errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Say that it is the output that cannot be written, and none of this program's files."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self._is_result:
                # What is held back would be tried again at the end of the process, and change its exit code.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
                return
            raise TryAgain(
                f"the output of this command cannot be written: {error.strerror}; what it had to do may be done "
                "already: make room, look, and run it again"
            ) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_controls(text: str) -> None:
    """Write a text of this program with its control characters to the standard output."""
    getattr(sys.stdout, "write_controls", sys.stdout.write)(text)
    sys.stdout.flush()


def protect_output() -> None:
    """Let the standard streams of this process escape control characters."""
    for name in ("stdout", "stderr"):
        # A program that was started with a closed stream has none.
        stream = getattr(sys, name) or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        if not isinstance(stream, VisibleStream):
            setattr(sys, name, VisibleStream(stream, is_result=name == "stdout"))
