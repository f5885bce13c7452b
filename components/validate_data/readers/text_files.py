"""Read texts from plain text files: blank lines separate them.

With `data.answer_after` a file is one text, since a prompt and its answer often have a blank line between them.
"""

from __future__ import annotations

from collections.abc import Iterator

from components.validate_data.readers import limits
from components.validate_data.readers.record import Record
from components.validate_data.readers.source_file import SourceFile
from qlora_retrain.config.data import DataConfig

DEFAULT_FIELD = "text"


def read_text(file: SourceFile, config: DataConfig) -> Iterator[Record]:
    """Yield each text of a file, as the field that `data.text_field` names.

    Raises:
        UsageError: For bytes that are no text.
    """
    field = config.text_field or DEFAULT_FIELD
    is_one_text = config.answer_after is not None
    first_line, num_characters, lines = 0, 0, list[str]()
    for number, line in file.lines():
        if line.strip() or (is_one_text and lines):
            first_line = first_line if lines else number
            lines.append(line)
            num_characters += len(line) + 1
            if num_characters > limits.MAX_ROW_CHARACTERS:
                raise limits.row_too_long(f"{file.name}:{first_line}")
        elif lines:
            yield Record(file.name, first_line, {field: "\n".join(lines)})
            lines, num_characters = [], 0
    if lines:
        yield Record(file.name, first_line, {field: "\n".join(lines).rstrip("\n")})
