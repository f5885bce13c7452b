"""Which encoding a text has, and what to do about bytes that do not fit it.

UTF-8 is the rule. UTF-16 and UTF-32 are read where the first bytes say so. Any other encoding is refused with the
command that converts this very file, since a wrong guess would change the text in silence.
"""

from __future__ import annotations

import codecs
import shlex
from dataclasses import dataclass, field
from typing import IO

from components.validate_data.readers.encoding_guess import EAST_ASIAN, guess_encoding

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # The mark of UTF-32 begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE_BYTES = 262_144
# Reads what is UTF-8 as it is, and each other byte as Windows-1252.
MEND_MIXED = (
    "import codecs, sys; codecs.register_error('w', lambda e: (e.object[e.start:e.end].decode('cp1252'), e.end)); "
    "sys.stdout.buffer.write(sys.stdin.buffer.read().decode('utf-8', 'w').encode())"
)
# Puts the halves of surrogate pairs together.
MEND_SURROGATES = (
    "import sys; t = sys.stdin.buffer.read().decode('utf-8', 'surrogatepass'); "
    "sys.stdout.buffer.write(t.encode('utf-16', 'surrogatepass').decode('utf-16').encode())"
)


def detect(head: bytes) -> str:
    """Return Python's name of the encoding that the first bytes show; UTF-8 where they show none."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    # JSON and CSV begin with a character of ASCII, whose other byte is zero in UTF-16.
    if len(head) >= 4 and head[1:2] == b"\0" != head[:1] and head[3:4] == b"\0" != head[2:3]:
        return "utf-16-le"
    if len(head) >= 4 and head[:1] == b"\0" != head[1:2] and head[2:3] == b"\0" != head[3:4]:
        return "utf-16-be"
    return "utf-8-sig"


@dataclass
class _Survey:
    """What a file holds beyond ASCII."""

    first_bad: tuple[int, int, int, int] | None = None  # the line, its column, the byte's position and its value
    num_lines: int = 0
    num_bad_lines: int = 0
    num_valid: int = 0  # characters beyond ASCII that are UTF-8
    num_bad: int = 0  # bytes that are not
    has_surrogates: bool = False  # halves of surrogate pairs, each written as a character of its own
    sample: bytearray = field(default_factory=bytearray)  # the first bad lines


def explain(error: UnicodeDecodeError, stream: IO[bytes], name: str, suffix: str, command_input: str) -> str:
    """Return what is wrong with the bytes of a file and how to mend it.

    Args:
        error: The error of the decoder that read the file.
        stream: The file's bytes, from the beginning.
        name: The file's name.
        suffix: The part of it that names the format, such as `.csv` of `a.csv.gz`.
        command_input: How a shell command gets the file's bytes.
    """
    if not error.encoding.startswith("utf-8") and error.encoding != "utf_8":
        return f"{name}: the file is {error.encoding.upper()}, but not to its end ({error.reason}); fetch it again"

    survey = _survey(stream)
    assert survey.first_bad is not None
    line, column, position, value = survey.first_bad
    location = f"{name}:{line}: byte {position} of the file (0x{value:02x}, byte {column} of the line) is not UTF-8"
    output = f"> {shlex.quote(_converted_name(name, suffix))}"
    if survey.has_surrogates:
        return (
            f"{location}: it is half of a surrogate pair, as programs write it that take UTF-16 for UTF-8 (CESU-8); "
            f'convert the file: `{command_input}python3 -c "{MEND_SURROGATES}" {output}`'
        )

    encoding = guess_encoding(bytes(survey.sample))
    # Pairs of bytes in Chinese, Japanese and Korean encodings are UTF-8 by chance now and then.
    is_by_chance = encoding in EAST_ASIAN and survey.num_bad > 2 * survey.num_valid
    if survey.num_valid and not is_by_chance:
        return (
            f"{location}, but {survey.num_valid:,} other characters of the file are: it mixes encodings. Do not "
            "convert it as a whole with iconv, which would turn every right \u00e9 into \u00c3\u00a9. "
            f"{survey.num_bad_lines:,} of {survey.num_lines:,} lines are concerned; show them with "
            f"`{command_input}LC_ALL=C.UTF-8 grep -naxv '.*'` and mend them, or read their odd bytes as Windows-1252: "
            f'`{command_input}python3 -c "{MEND_MIXED}" {output}`'
        )
    if encoding:
        command = f"{command_input}iconv -f {encoding} -t UTF-8 {output}"
        return f"{location}; the file reads like {encoding}: convert it, `{command}`"
    return (
        f"{location}, and the file reads well in no common encoding; ask where it comes from, and convert it with "
        f"`{command_input}iconv -f ENCODING -t UTF-8 {output}`, or leave it out with the source's `files`"
    )


def _converted_name(name: str, suffix: str) -> str:
    """Return a name by which the converted file is read as what it is: `a.utf8.csv` of `a.csv.gz`."""
    stem, dot, _ = name.rpartition(suffix) if suffix else (name, "", "")
    return f"{stem if dot else name}.utf8{suffix}"


def _survey(stream: IO[bytes]) -> _Survey:
    survey = _Survey()
    position = 0
    for number, line in enumerate(stream, 1):
        survey.num_lines = number
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            text = line.decode("utf-8", "surrogateescape")
            survey.num_bad_lines += 1
            survey.num_bad += sum("\udc80" <= character <= "\udcff" for character in text)
            if survey.first_bad is None:
                survey.first_bad = (number, error.start + 1, position + error.start, line[error.start])
                # The code points of surrogates would be ED A0 80 to ED BF BF.
                survey.has_surrogates = line[error.start] == 0xED and line[error.start + 1 : error.start + 2] >= b"\xa0"
            if len(survey.sample) < _SAMPLE_BYTES:
                survey.sample += line
        survey.num_valid += sum(character > "\x7f" and not "\udc80" <= character <= "\udcff" for character in text)
        position += len(line)
    return survey
