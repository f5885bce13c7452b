"""Read rows from JSON: one object a line, a list of objects, a list inside an object, or objects one after another.

Which of them a file holds is read from its beginning. In JSON lines a broken line is a fault of that row alone. In a
document that goes over several lines nothing says where the next row begins, so there it is an error of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from components.validate_data.readers import limits
from components.validate_data.readers.json_documents import read_document
from components.validate_data.readers.json_rows import to_record
from components.validate_data.readers.json_text import Decoded, StrictDecoder, is_cut
from components.validate_data.readers.record import Record
from components.validate_data.readers.source_file import SourceFile
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import progress

# The lines of the beginning that say whether a file has one value a line.
_SAMPLE_LINES = 20
_MAX_LINE_CHARACTERS = limits.MAX_ROW_CHARACTERS


def read_json(file: SourceFile, config: DataConfig) -> Iterator[Record]:
    """Yield the rows of a JSON file of any of these forms.

    Raises:
        UsageError: If a document is not JSON, or does not say where its rows are.
    """
    if _has_one_value_a_line(file):
        yield from _read_lines(file)
    else:
        yield from read_document(file, config)


def _has_one_value_a_line(file: SourceFile) -> bool:
    decoder = StrictDecoder()
    with file.reading_errors(), file.open_text() as stream:
        # A document without line breaks is one line, which is cut. An empty file has none at all.
        lines = limits.first_lines(stream, _SAMPLE_LINES, _MAX_LINE_CHARACTERS)
        sample = [line.lstrip("\ufeff\x1e").rstrip() for line in lines if line.strip()]
    if not sample:
        return True

    first = sample[0].lstrip()
    if _decode_line(decoder, first) is not None:
        # A single line may as well be a document: a list of rows, or an object that holds them.
        return len(sample) > 1
    # The first line is the beginning of a document, or it is broken.
    if first.startswith("[") or _is_beginning(decoder, "\n".join(sample).lstrip()):
        return False
    return any(line.startswith("{") and _decode_line(decoder, line) is not None for line in sample[1:])


def _is_beginning(decoder: StrictDecoder, text: str) -> bool:
    """Return whether the text is JSON as far as it goes."""
    try:
        decoder.decode(text)
    except json.JSONDecodeError as error:
        return is_cut(error)
    except RecursionError:
        return False
    return True


def _decode_line(decoder: StrictDecoder, line: str) -> list[Decoded] | None:
    """Return the values on a line, usually one; None where it is not JSON."""
    try:
        return _decode_values(decoder, line)
    except (json.JSONDecodeError, RecursionError):
        return None


def _decode_values(decoder: StrictDecoder, line: str) -> list[Decoded]:
    """Return the values on a line; a comma after a value, as in a list without brackets, changes nothing.

    Raises:
        json.JSONDecodeError: If the line is not JSON to its end.
        RecursionError: If it is nested too deep to be read at all.
    """
    values = [decoder.decode(line)]
    # Where a line break is missing, two rows share a line.
    while rest_of_line := line[values[-1].end :].lstrip().removeprefix(",").lstrip():
        values.append(decoder.decode(line, len(line) - len(rest_of_line)))
    return values


def _read_lines(file: SourceFile) -> Iterator[Record]:
    decoder = StrictDecoder()
    last_fault: Record | None = None
    for number, text in file.lines():
        # The mark of a file that was appended to another one, and that of RFC 7464.
        line = text.strip(" \t\r\ufeff\x1e")
        if not line:
            continue
        if last_fault:
            yield last_fault
            last_fault = None
        try:
            records = [to_record(file.name, number, value) for value in _decode_values(decoder, line)]
        except (json.JSONDecodeError, RecursionError) as error:
            last_fault = Record(file.name, number, None, "bad_json_line", _explain(error, line))
            continue
        yield from records

    # Held back until here, since only the last line can have been cut off.
    if last_fault:
        progress.say(f"{file.name}:{last_fault.number}: the last line is broken: the file may be cut off")
        detail = f"{last_fault.detail}; it is the last line: the file may be cut off, so fetch it again"
        yield Record(file.name, last_fault.number, None, last_fault.fault, detail)


def _explain(error: json.JSONDecodeError | RecursionError, line: str) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "it is nested too deep"
    if line.startswith(("{'", "[{'")):
        return "it is Python's notation with single quotes; write JSON, e.g. with json.dumps"
    return f"{error.msg}, column {error.colno}"
