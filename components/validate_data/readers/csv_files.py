"""Read rows from CSV files and their relatives: separated by commas, semicolons, tabs or bars, with a header.

Quotes are read strictly (RFC 4180). A row with too many or too few fields is a fault of that row. A quote that does not
close is an error of the file, since nobody can say where the next row begins.
"""

from __future__ import annotations

import csv
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TextIO

from components.validate_data.readers import limits
from components.validate_data.readers.json_shapes import configured_fields
from components.validate_data.readers.record import Record
from components.validate_data.readers.source_file import SourceFile
from components.validate_data.values import shorten
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError

# The csv module's own limit, 128 Ki characters, is less than a long chat.
MAX_FIELD_CHARACTERS = limits.MAX_ROW_CHARACTERS
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SAMPLE_LINES = 200
_MAX_SAMPLE_CHARACTERS = 1 << 22
# A first line that names the delimiter, as Excel writes it.
_STATED_DELIMITER = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_MAX_NAME_CHARACTERS = 64
_MIN_REPEATED = 2  # rows in which a value of the first line comes again, if that line is no header
# Writes fields that tabs separate as CSV, with every quote as it is.
_FROM_TABS = (
    "import csv, sys; csv.writer(sys.stdout).writerows(line.rstrip('\\r\\n').split('\\t') for line in sys.stdin)"
)
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a file separates its fields."""

    delimiter: str = ","
    skip_space: bool = False  # a blank after each delimiter is no part of the field
    has_quotes: bool = True  # otherwise a quote is a character like any other
    num_skipped_lines: int = 0

    def reader(self, lines: Iterable[str]) -> Any:
        """Return the csv module's reader of the lines."""
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if self.has_quotes else csv.QUOTE_NONE
        return csv.reader(
            lines, strict=True, delimiter=self.delimiter, skipinitialspace=self.skip_space, quoting=quoting
        )


def read_csv(file: SourceFile, config: DataConfig) -> Iterator[Record]:
    """Yield the rows of a CSV file with a header.

    Raises:
        UsageError: For a file without a header, with two columns of one name, or with a quote that is not closed.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with file.reading_errors(), file.open_text() as stream:
        sample = limits.first_lines(stream, _SAMPLE_LINES, _MAX_SAMPLE_CHARACTERS)
    dialect = recognise_dialect(sample, config, file.suffix)
    if dialect.delimiter != ",":
        progress.say(f"{file.name}: the fields are separated by {DELIMITERS.get(dialect.delimiter, 'another sign')}")

    sample_rows = _parse_sample(sample, dialect)
    if sample_rows:
        _check_header(file, sample_rows[0], sample_rows[1:], config, dialect)
    with file.reading_errors(), file.open_text() as stream:
        yield from _read_rows(file, stream, dialect)


def recognise_dialect(sample: Sequence[str], config: DataConfig, suffix: str) -> Dialect:
    """Return how the fields are separated: as the first line says, else as it fits the header and most rows."""
    stated = _STATED_DELIMITER.fullmatch(sample[0]) if sample else None
    num_skipped = 1 if stated else 0
    if stated:
        return _refined(Dialect(stated[1], num_skipped_lines=1), sample)

    fields = configured_fields(config)
    candidates = []
    for order, delimiter in enumerate(DELIMITERS):
        rows = _parse_sample(sample, Dialect(delimiter, num_skipped_lines=num_skipped))
        header = rows[0] if rows else []
        num_fitting = sum(len(row) == len(header) for row in rows)
        # Fields that the config names must be there; then every row should have the header's number of fields.
        is_expected = delimiter == "\t" and suffix in (".tsv", ".tab")
        is_divided = len(header) > 1
        score = (len(fields & {name.strip() for name in header}), is_expected and is_divided, is_divided, num_fitting)
        candidates.append((score, -order, delimiter))
    return _refined(Dialect(max(candidates)[2]), sample)


def _refined(dialect: Dialect, sample: Sequence[str]) -> Dialect:
    """Return the dialect with what the first rows say about blanks after delimiters and about quotes."""
    rows = _parse_sample(sample, dialect)
    has_spaces = bool(rows) and len(rows[0]) > 1 and all(name.startswith(" ") for name in rows[0][1:])
    # Most files with tabs have no quoting: a quote may stand anywhere in a text, also at its beginning.
    literal = replace(dialect, has_quotes=False)
    literal_rows = _parse_sample(sample, literal)
    is_literal = dialect.delimiter == "\t" and not any(
        len(row) != len(literal_rows[0]) or any(_is_quoted(field) for field in row) for row in literal_rows
    )
    return replace(literal if is_literal else dialect, skip_space=has_spaces)


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field.startswith('"') and field.endswith('"')


def _parse_sample(sample: Sequence[str], dialect: Dialect) -> list[list[str]]:
    """Return the rows of the first lines, as far as they can be read."""
    rows: list[list[str]] = []
    reader = dialect.reader(sample[dialect.num_skipped_lines :])
    while True:
        try:
            row = next(reader, None)
        except csv.Error:
            # The last row of the sample may be cut off; another fault is reported when the file is read.
            return rows
        if row is None:
            return rows
        if row:
            rows.append(row)


def _check_header(
    file: SourceFile, header: Sequence[str], rows: Sequence[Sequence[str]], config: DataConfig, dialect: Dialect
) -> None:
    """Refuse two columns of one name, and a first line that is a row."""
    line = dialect.num_skipped_lines + 1
    names = _stripped(header)
    repeated = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if repeated:
        places = (str(i) for i, name in enumerate(names, 1) if name == repeated[0])
        numbers = " and ".join(itertools.islice(places, 2))
        raise UsageError(
            f'{file.name}:{line}: more than one column has the name "{shorten(repeated[0])}": columns {numbers}; give '
            "each a name of its own, since nothing says which one is meant"
        )

    reason = _why_no_header(names, [_stripped(row) for row in rows])
    if reason and not configured_fields(config) & set(names):
        example = dialect.delimiter.join(["prompt", "answer"] if len(names) == 2 else ["name"] * len(names))
        command = f"(echo '{example}'; cat {shlex.quote(file.name)}) > {shlex.quote(f'{file.name}.csv')}"
        raise UsageError(
            f"{file.name}:{line}: the first line is no header: {reason}. A CSV file begins with the names of its "
            f"{len(names)} columns; put them in front, e.g. `{command}`; or, if these are the names, set "
            "data.prompt_field and data.response_field to two of them"
        )


def _why_no_header(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str | None:
    """Return what shows that the first line is a row; None where nothing does."""
    for number, name in enumerate(names, 1):
        if _NUMBER.fullmatch(name):
            return f"field {number} is a number"
        if len(name) > _MAX_NAME_CHARACTERS:
            return f"field {number} has {len(name):,} characters"
        if " " in name and name.endswith((".", "?", "!")):
            return f"field {number} is a sentence"
        num_repeated = sum(row[number - 1] == name for row in rows if len(row) == len(names) and row != names)
        if name and num_repeated >= _MIN_REPEATED:
            return f"the value of field {number} comes again in {num_repeated} of the next rows"
    return None


def _read_rows(file: SourceFile, stream: TextIO, dialect: Dialect) -> Iterator[Record]:
    for _ in range(dialect.num_skipped_lines):
        stream.readline()

    lines = limits.BoundedLines(stream, file.name)
    reader = dialect.reader(lines)
    names: list[str] | None = None
    while True:
        # The record's first line. A quoted field may hold line breaks, so the reader's own count is of the last line.
        first_line = dialect.num_skipped_lines + reader.line_num + 1
        lines.begin_row()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UsageError(f"{file.name}:{first_line}: not valid CSV ({error}); {_advice(file, error)}") from None
        if fields is None:
            return
        if not fields:  # an empty line
            continue

        if names is None:
            names = _stripped(fields)
        elif dialect.delimiter == "\t" and any("\n" in field and "\t" in field for field in fields):
            command = f'{file.command_input}python3 -c "{_FROM_TABS}" > {shlex.quote(f"{file.name}.csv")}'
            raise UsageError(
                f"{file.name}:{first_line}: the quote that opens there closes some lines further down. If quotes are "
                f"plain characters of this file, convert it: `{command}`; else mend the quote"
            )
        elif len(fields) != len(names):
            detail = f"{len(fields)} fields, and the header has {len(names)}"
            yield Record(file.name, first_line, None, "ragged_row", detail)
        else:
            yield Record(file.name, first_line, dict(_named_fields(names, fields)))


def _stripped(fields: Sequence[str]) -> list[str]:
    """Return the fields without blanks, and without the byte order mark of a file that was joined to another."""
    return [field.strip(" \t\r\n\ufeff") for field in fields]


def _named_fields(names: Sequence[str], fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    for number, (name, value) in enumerate(zip(names, fields, strict=True), 1):
        if name:
            yield name, value
        # A column without a name is the row numbers that pandas writes, or what a spreadsheet leaves at the end.
        elif value and not value.isdigit():
            yield f"column {number}", value


def _advice(file: SourceFile, error: csv.Error) -> str:
    output = shlex.quote(f"{file.name}.csv")
    if "new-line character" in str(error):
        command = f"{file.command_input}tr '\\r' '\\n' > {output}"
        return f"a carriage return stands in the line, where other lines end with a line feed: `{command}`"
    if "expected after" in str(error):
        command = f'{file.command_input}sed \'s/\\\\"/""/g\' > {output}'
        return (
            "a quote inside a quoted field must be doubled. Where a backslash stands before it, as Spark and MySQL "
            f"write it: `{command}`"
        )
    return "close the quote that opens there, or fetch the file again"
