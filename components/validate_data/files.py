"""From a folder of files to records. What a row says is not looked at here.

A fault that makes a whole file unusable (its format, its encoding, its syntax) is a `UsageError` that names the file,
the line, and what to do. A fault of one row travels with that row. Nothing is guessed where a guess could change a
text, and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from components.validate_data.readers import limits
from components.validate_data.readers.arrow_files import read_arrow, read_parquet
from components.validate_data.readers.csv_files import read_csv
from components.validate_data.readers.file_kinds import Format, evaluation_files, list_files, recognise
from components.validate_data.readers.json_files import read_json
from components.validate_data.readers.record import Record as Record
from components.validate_data.readers.source_file import SourceFile
from components.validate_data.readers.text_files import read_text
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError

_MAX_NAMES = 5  # in a line of the log


def read_records(folder: Path, config: DataConfig, source: str) -> Iterator[Record]:
    """Yield every record of every file, in the order of the file names; those of one file come together.

    Args:
        folder: The source's files, in folders or not.
        config: What the line says about its data.
        source: The source's name, for messages.

    Raises:
        UsageError: For a file that cannot be read, or that has no rows.
    """
    files, skipped = list_files(folder, config)
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
    formats = {file.name: recognise(file, config, source) for file in files}
    for file in files:
        _say_how_text_is_read(file, formats[file.name])
        num_rows = 0
        for record in _read(file, formats[file.name], config):
            num_rows += 1
            if num_rows * limits.MIN_ROW_CHARACTERS > file.max_characters:
                raise file.too_large()
            yield record
        if not num_rows:
            raise UsageError(
                f"{file.name}: the file has no rows; find out why it is empty, or leave it out with "
                f"sources.{source}.files"
            )


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
