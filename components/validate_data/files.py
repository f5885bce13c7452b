"""From a folder of files to records. What a row says is not looked at here.

A fault that makes a whole file unusable (its format, its encoding, its syntax) is a `UsageError` that names the file,
the line, and what to do; one error lists all such files of a source. A fault of one row travels with that row. Nothing
is guessed where a guess could change a text, and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from components.validate_data.readers import limits
from components.validate_data.readers.arrow_files import read_arrow, read_parquet
from components.validate_data.readers.csv_files import read_csv
from components.validate_data.readers.file_kinds import evaluation_files, list_files, recognise
from components.validate_data.readers.json_files import read_json
from components.validate_data.readers.record import Record as Record
from components.validate_data.readers.source_file import SourceFile
from components.validate_data.readers.text_files import read_text
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError
from qlora_retrain.evaluation.data_files import Format

_MAX_NAMES = 5  # in a line of the log
_MAX_FAULTS = 20  # in one error
REPEATED_HEADERS = "repeated_headers"
_AROUND_NAMES = " \t\r\n\ufeff"


class FileFaults:
    """Collect what makes whole files of a source unusable, so that a person sees all of it at once.

    Attributes:
        num_files: The number of files that the source has.
    """

    def __init__(self, source: str) -> None:
        self.num_files = 0
        self._source = source
        self._errors: dict[str, UsageError] = {}

    def __bool__(self) -> bool:
        return bool(self._errors)

    @contextmanager
    def collect(self, file: str) -> Iterator[None]:
        """Keep the error that a file has, if it has one."""
        try:
            yield
        except UsageError as error:
            self._errors[file] = error

    def check(self) -> None:
        """Raise the error of the only such file, or one that lists the first of several.

        Raises:
            UnusableFiles: If a file has an error.
        """
        if not self._errors:
            return
        messages = [str(error) for _, error in sorted(self._errors.items())]
        if len(messages) == 1:
            raise UnusableFiles(messages[0]) from next(iter(self._errors.values()))
        num_hidden = len(messages) - _MAX_FAULTS
        listed = messages[:_MAX_FAULTS] + ([f"and {num_hidden:,} more"] if num_hidden > 0 else [])
        raise UnusableFiles(
            f"{self._source}: {len(messages):,} of {self.num_files:,} files cannot be used:\n" + "\n".join(listed)
        )


class UnusableFiles(UsageError):
    """Whole files of a source cannot be used."""


def read_files(
    folder: Path, config: DataConfig, source: str, faults: FileFaults
) -> Iterator[tuple[str, Iterator[Record]]]:
    """Yield the name and the records of every file, in the order of the names.

    Args:
        folder: The source's files, in folders or not.
        config: What the line says about its data.
        source: The source's name, for messages.
        faults: Gets the files of no known format. Whoever reads the records collects the errors of reading there.

    Raises:
        UsageError: If there are no files.
    """
    files, skipped = list_files(folder, config)
    faults.num_files = len(files)
    if skipped:
        progress.say(f"{source}: {len(skipped)} files beside the data are not read: {_listing(skipped)}")
    if not files:
        only = f" but {_listing(skipped)}" if skipped else ""
        raise UsageError(
            f"{source}: there are no files{only}; the source is an empty folder, or sources.{source}.files matches "
            "no file"
        )
    if source == "raw_data" and (names := evaluation_files([file.name for file in files])):
        progress.say(
            f"{source}: {_listing(names)} will be trained on too, although the name says evaluation; to hold it apart, "
            f"leave it out with sources.{source}.files and name it in sources.eval_data"
        )

    # All formats are checked first, so that a wrong file is reported before large ones are read.
    formats: dict[str, Format] = {}
    for file in files:
        with faults.collect(file.name):
            formats[file.name] = recognise(file, config, source)
    for file in files:
        if file.name in formats:
            yield file.name, _read_file(file, formats[file.name], config, source)


def read_records(folder: Path, config: DataConfig, source: str) -> Iterator[Record]:
    """Yield every record of every file, in the order of the file names; those of one file come together.

    Raises:
        UsageError: For files that cannot be read, or that have no rows.
    """
    faults = FileFaults(source)
    for name, records in read_files(folder, config, source, faults):
        with faults.collect(name):
            yield from records
    faults.check()


def _read_file(file: SourceFile, format_: Format, config: DataConfig, source: str) -> Iterator[Record]:
    _say_how_text_is_read(file, format_)
    num_rows, checks_headers = 0, config.checks[REPEATED_HEADERS] != "off"
    for record in _read(file, format_, config):
        num_rows += 1
        if num_rows * limits.MIN_ROW_CHARACTERS > file.max_characters:
            raise file.too_large()
        is_header = checks_headers and record.fields and _is_header(record.fields)
        yield Record(file.name, record.number, None, REPEATED_HEADERS) if is_header else record
    if not num_rows:
        raise UsageError(
            f"{file.name}: the file has no rows; find out why it is empty, or leave it out with sources.{source}.files"
        )


def _is_header(fields: Mapping[str, object]) -> bool:
    """Return whether each value is the name of its field, with the byte order mark of a file that was joined or not."""
    return all(isinstance(value, str) and value.strip(_AROUND_NAMES) == name for name, value in fields.items())


def _read(file: SourceFile, format_: Format, config: DataConfig) -> Iterator[Record]:
    match format_:
        case "json":
            return read_json(file, config)
        case "csv":
            return read_csv(file, config)
        case "text":
            return read_text(file, config)
        case "parquet":
            return read_parquet(file)
        case "arrow":
            return read_arrow(file)


def _say_how_text_is_read(file: SourceFile, format_: Format) -> None:
    """Log what is unusual about a file's text, since a wrong reading would show in every row."""
    if format_ in ("json", "csv", "text"):
        if file.encoding != "utf-8-sig":
            progress.say(f"{file.name}: the text is read as {file.encoding.upper()}")
        if file.line_end == "\r":
            progress.say(f"{file.name}: carriage returns alone end the lines")


def _listing(names: list[str]) -> str:
    """Return the first names, and how many follow them."""
    num_hidden = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {num_hidden} more" if num_hidden > 0 else "")
