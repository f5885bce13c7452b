"""Decode JSON strictly, from a text that is read as far as it is needed.

Python's decoder takes more than JSON (Infinity, two values of one name) and less (numbers of more than 4,300 digits).
Here both are faults of the row that has them, and the rows after it are read. NaN stands for null.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, TextIO

from components.validate_data.readers import limits
from components.validate_data.values import shorten
from qlora_retrain.core import json_depth
from qlora_retrain.core.json_depth import MAX_DEPTH

_MAX_INT_DIGITS = 1000
_CHUNK_CHARACTERS = 1 << 16
_MAX_VALUES = 1 << 24  # in a document that is read as a whole; each takes about a hundred bytes of memory
_WHITE_SPACE = re.compile(r"[ \t\r\n\x1e\ufeff]*")  # with the mark of concatenated files, and that of RFC 7464
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# An error this near to the end of what has been read so far may be that the value goes on.
_LONGEST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Decoded:
    """A value, where it ends in the text, and the first fault of a row that has this value, if any."""

    value: Any
    end: int
    fault: str | None = None
    detail: str = ""


class StrictDecoder:
    """Decodes one value at a time."""

    def __init__(self) -> None:
        self._fault: tuple[str, str] | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_int=self._int,
            parse_float=self._float,
        )

    def decode(self, text: str, start: int = 0) -> Decoded:
        """Decode the value that begins at `start`.

        Raises:
            json.JSONDecodeError: For text that is not JSON, or not yet.
            RecursionError: For a value that is nested too deep to be read at all.
        """
        self._fault = None
        value, end = self._decoder.raw_decode(text, start)
        if not self._fault and text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH:
            self._note(
                json_depth.depth(value) > MAX_DEPTH, "bad_json_line", f"it is nested deeper than {MAX_DEPTH} levels"
            )
        if not self._fault and _SURROGATE_ESCAPE.search(text, start, end):
            fields = value if isinstance(value, dict) else {}
            names = [f'in "{shorten(name)}"' for name, item in fields.items() if _has_surrogate([name, item])]
            self._note(_has_surrogate(value), "bad_unicode", (names or [""])[0])
        return Decoded(value, end, *(self._fault or ()))

    def _note(self, is_fault: bool, fault: str, detail: str) -> None:
        if is_fault and not self._fault:
            self._fault = (fault, detail)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            self._note(True, "duplicate_key", f'"{shorten(repeated)}"')
        return fields

    def _constant(self, name: str) -> None:
        # NaN is how pandas and Python write a value that is missing, so it is read as null.
        self._note(name != "NaN", "bad_json_line", f"{name} is no JSON value; write null, or a number")

    def _int(self, digits: str) -> int:
        is_too_long = len(digits) > _MAX_INT_DIGITS
        self._note(is_too_long, "bad_json_line", f"a number has {len(digits):,} digits")
        return 0 if is_too_long else int(digits)

    def _float(self, digits: str) -> float:
        number = float(digits)
        self._note(math.isinf(number), "bad_json_line", "a number is larger than a 64-bit float can be")
        return number


class ValueTooLong(ValueError):
    """A value that is longer than it may be."""


class JsonText:
    """A cursor on a text of JSON; it holds what has not been consumed yet and little more."""

    def __init__(self, stream: TextIO, line_end: str = "\n") -> None:
        self.line = 1  # of the cursor
        self.is_whole = False  # whether the text was read to its end, so that an error there means a cut
        self._stream = stream
        self._line_end = line_end
        self._buffer = ""
        self._position = 0
        self._line_offset = 0  # characters of the buffer's first line that are no longer in it
        self._decoder = StrictDecoder()
        self._num_dropped = 0  # characters before the buffer

    @property
    def offset(self) -> int:
        """How many characters have been consumed."""
        return self._num_dropped + self._position

    def peek(self) -> str:
        """Return the next character that is no white space, without consuming it; "" at the end."""
        while True:
            match = _WHITE_SPACE.match(self._buffer, self._position)
            assert match is not None
            self._consume(match.end())
            if self._position < len(self._buffer) or not self._read(_CHUNK_CHARACTERS):
                return self._buffer[self._position : self._position + 1]

    def skip(self, character: str) -> bool:
        """Consume the next character if it is this one, and return whether it was."""
        if self.peek() != character:
            return False
        self._consume(self._position + 1)
        return True

    def expect(self, characters: str) -> str:
        """Consume one of these characters.

        Raises:
            json.JSONDecodeError: If another one is next.
        """
        character = self.peek()
        if not character or character not in characters:
            raise json.JSONDecodeError(f"Expecting {' or '.join(characters)}", self._buffer, self._position)
        self._consume(self._position + 1)
        return character

    def value(self, max_characters: int | None = None) -> Decoded:
        """Consume the next value, which has at most the characters of a row if nothing else is said.

        Raises:
            json.JSONDecodeError: If there is none.
            ValueTooLong: If it has more characters, or very many values inside.
        """
        self.peek()
        max_characters = max_characters or limits.MAX_ROW_CHARACTERS
        size = _CHUNK_CHARACTERS
        while True:
            num_characters = len(self._buffer) - self._position
            if num_characters > limits.MAX_ROW_CHARACTERS:
                num_values = sum(self._buffer.count(mark, self._position) for mark in ",[{")
                if num_values > _MAX_VALUES:
                    raise ValueTooLong
            try:
                decoded = self._decoder.decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                if is_cut(error) and num_characters > max_characters:
                    raise ValueTooLong from None
                if not is_cut(error) or not self._read(min(size, max_characters + 1 - num_characters)):
                    raise
            else:
                # A number at the end of what has been read may have more digits.
                if decoded.end < len(self._buffer) or not self._read(size):
                    if decoded.end - self._position > max_characters:
                        raise ValueTooLong
                    self._consume(decoded.end)
                    return decoded
            # Each try begins anew, so that the parts must grow for the work to stay in proportion.
            size *= 2

    def location(self, error: json.JSONDecodeError) -> tuple[int, int]:
        """Return the line and the column of an error that this cursor raised, both from 1."""
        line = self.line + self._buffer.count(self._line_end, self._position, error.pos)
        line_start = self._buffer.rfind(self._line_end, 0, error.pos) + 1
        return line, error.pos - line_start + (0 if line_start else self._line_offset) + 1

    def _read(self, size: int) -> bool:
        """Read a further part of the text into the buffer, and drop what is consumed."""
        part = self._stream.read(size)
        if not part:
            self.is_whole = True
            return False

        line_start = self._buffer.rfind(self._line_end, 0, self._position) + 1
        self._line_offset = self._position - line_start + (0 if line_start else self._line_offset)
        self._num_dropped += self._position
        self._buffer = self._buffer[self._position :] + part
        self._position = 0
        return True

    def _consume(self, end: int) -> None:
        self.line += self._buffer.count(self._line_end, self._position, end)
        self._position = end


def is_cut(error: json.JSONDecodeError) -> bool:
    """Return whether the text may be JSON that goes on: the error is at its end."""
    return error.msg.startswith("Unterminated") or error.pos >= len(error.doc) - _LONGEST_TOKEN


def _has_surrogate(value: object) -> bool:
    """Return whether a text in the value holds half of a surrogate pair, which UTF-8 cannot write."""
    # The encoder joins the halves of a pair, so that only single ones are left.
    return any("\ud800" <= character <= "\udfff" for character in json.dumps(value, ensure_ascii=False))
