"""From records to raw rows: each file's layout is decided once, and each record becomes a chat or a fault.

What makes a whole file unusable (no layout fits, a field is misspelt) is a `UsageError` that names the file, the field
and the near match. A fault of one row travels with that row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from components.validate_data.calls import Tool
from components.validate_data.field_leaves import describe_fields
from components.validate_data.field_names import Columns, columns_of
from components.validate_data.files import FileFaults, Record, read_files
from components.validate_data.keep import RowFilter
from components.validate_data.layouts import Layout
from components.validate_data.markers import EndMarkers
from components.validate_data.readers.limits import count_characters
from components.validate_data.recognition import choose_layout
from components.validate_data.redaction import redacted_errors
from components.validate_data.row_chat import RowChat, build_chat, without_padding
from components.validate_data.turn_rows import conversation_field, join_turns
from components.validate_data.turns import TurnParser
from components.validate_data.unread import UnreadColumns
from components.validate_data.unread_refusal import explain_refusal
from components.validate_data.values import RowFault, did_you_mean, is_empty, leaf_paths, shorten, text_of, value_at
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError

SAMPLE_ROWS = 200  # of each file, from which its layout is recognised
_SAMPLE_CHARACTERS = 1 << 26  # of very long rows, fewer are enough
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8}){0,3}")  # e.g. de, pt-BR, english
_MAX_FIELD_NAMES = 50  # in a message; each row of JSON may have other names


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as a chat, or the reason why it has none.

    Attributes:
        file: The path below the source's folder.
        number: The line on which the row begins, from 1; in Parquet the number of the row.
        messages: The chat; with a fault the value that should be one, which can be anything.
        tools: The tools that the row lists, in the OpenAI form.
        fault: The reason code of a row that has no chat.
        detail: What was found, for a message; never a row's text beyond the name of a field or a role.
        language: The value of `data.language_field`, if it is a language tag.
        field: The names of the fields that should hold the chat, quoted, for a message.
        group: The value of `data.group_field`, as text.
    """

    file: str
    number: int
    messages: object
    tools: list[Tool] | None = None
    fault: str | None = None
    detail: str = ""
    language: str | None = None
    field: str = ""
    group: str | None = None


class RowReader:
    """Read the rows of one source; what was noticed on the way is complete when all rows are read.

    Attributes:
        layouts: What was taken as the chat, by file.
        unread: The text columns that nothing reads, with the number of rows that fill each.
        warnings: Sentences about what may be wrong, for the log and the report.
    """

    def __init__(self, folder: Path, config: DataConfig, source: str) -> None:
        self._folder, self._config, self._source = folder, config, source
        self._parser = TurnParser(config.roles, config.ignore_fields)
        self._filter = RowFilter(config.keep)
        further = [path for path in (config.language_field, config.group_field) if path]
        self._unread = UnreadColumns((*config.ignore_fields, *config.keep, *further))
        self._markers = EndMarkers()
        optional = {
            name: getattr(config, name) for name in ("system_field", "tools_field", "language_field", "group_field")
        }
        # The settings whose fields no row has had so far, and the names of the fields that rows have.
        self._absent_fields = {name: path for name, path in optional.items() if path}
        self._names: dict[str, None] = {}
        self._num_json_answers = 0
        self._last_layout: Layout | None = None
        self._is_configured = any((config.messages_field, config.response_field, config.text_field))
        self.layouts: dict[str, str] = {}
        self.unread: dict[str, int] = {}
        self.warnings: list[str] = []

    def rows(self) -> Iterator[RawRow]:
        """Yield every row of every file, in the order of the file names; then judge what was noticed.

        Raises:
            UsageError: For a file that cannot be read or has no layout, a setting that no row fits, and columns that
                nothing reads although the prompt seems to need them.
        """
        with redacted_errors():
            yield from self._all_rows()

    def _all_rows(self) -> Iterator[RawRow]:
        faults = FileFaults(self._source)
        for file, records in read_files(self._folder, self._config, self._source, faults):
            with faults.collect(file):
                for row in self._file_rows(file, records):
                    # With a file that cannot be used, the others are read for their faults alone.
                    if not faults:
                        yield row
        faults.check()
        self._finish()

    def _file_rows(self, file: str, records: Iterator[Record]) -> Iterator[RawRow]:
        samples = _sample(records)
        # A file without a single row that can be looked at has no layout; its rows have their faults.
        columns = columns_of(record.fields for record in samples if record.fields is not None)
        if not self._is_configured and (field := conversation_field(columns)):
            progress.say(f'{self._source}: {file}: each row is a turn of the conversation that "{field}" names')
            records = join_turns(chain(samples, records), field)
            samples = _sample(records)
            columns = columns_of(record.fields for record in samples if record.fields is not None)
        # A parser of its own, since the one of the rows counts what it ignores.
        parser = TurnParser(self._config.roles, self._config.ignore_fields)
        layout = choose_layout(file, columns, self._config, parser) if columns else Layout("")
        if columns:
            self._last_layout = layout
            self.layouts[file] = layout.description
            progress.say(f"{self._source}: {file}: {layout.description}")

        words = layout.words
        names, unfilled = dict[str, None](), dict.fromkeys((*layout.required, *layout.prompt_fields))
        for record in chain(samples, records):
            if record.fields is not None:
                unfilled = {path: None for path in unfilled if value_at(record.fields, path) is None}
                if len(names) < _MAX_FIELD_NAMES:
                    names.update(dict.fromkeys(record.fields))
                self._note_optional_fields(record.fields)
            yield self._row(record, layout, words)

        self._names.update(names)
        missing = [path for path in unfilled if path not in layout.optional]
        if names and missing:
            raise _field_error(file, missing[0], names, columns)

    def _row(self, record: Record, layout: Layout, words: str) -> RawRow:
        fields = record.fields
        if fields is None:
            return RawRow(record.file, record.number, None, fault=record.fault, detail=record.detail)
        if not self._filter.is_kept(fields, is_optional=self._source != "raw_data"):
            return RawRow(record.file, record.number, None, fault="not_kept")

        language = _language(fields, self._config)
        if record.is_padded:
            fields = without_padding(fields, layout, self._parser)
        try:
            chat = build_chat(fields, layout, self._config, self._parser)
        except RowFault as fault:
            raw = [value_at(fields, path) for path in (*layout.required, *layout.prompt_fields)]
            return RawRow(record.file, record.number, raw, None, fault.reason, fault.detail, language, words)
        self._note_chat(fields, layout, chat)
        group = value_at(fields, self._config.group_field) if self._config.group_field else None
        return RawRow(
            record.file,
            record.number,
            chat.messages,
            chat.tools,
            language=language,
            field=words,
            group=None if is_empty(group) else text_of(group),
        )

    def _note_optional_fields(self, fields: Mapping[str, object]) -> None:
        for name, path in list(self._absent_fields.items()):
            if value_at(fields, path) is not None:
                del self._absent_fields[name]

    def _note_chat(self, fields: Mapping[str, object], layout: Layout, chat: RowChat) -> None:
        """Count what nothing reads, and the ends of the texts."""
        answers = [i for i, turn in enumerate(chat.messages) if turn["role"] == "assistant"]
        last = answers[-1] if answers else len(chat.messages)
        before = chat.messages[:last]
        answer = chat.messages[last] if answers else {"content": ""}

        prompt = ([(turn["role"], turn["content"]) for turn in before], chat.tools)
        calls = answer.get("tool_calls")
        self._unread.add(fields, layout, str(prompt), f"{answer['content']}{calls or ''}", chat.pieces)
        if layout.response and not calls and isinstance(value_at(fields, layout.response), dict | list):
            self._num_json_answers += len(answer) == 2 and answer["content"][:1] in ("{", "[")
        if not calls:
            self._markers.add(before[-1]["content"] if before else "", answer["content"])

    def _finish(self) -> None:
        self._filter.check(self._source)
        for name, path in self._absent_fields.items() if self._source == "raw_data" else ():
            raise UsageError(
                f"{self._source}: data.{name}: no row has a value in the field {path}"
                f"{did_you_mean(path, self._names)}; the fields are: {', '.join(map(shorten, self._names))}"
            )

        self.unread = self._unread.counts
        self.warnings += self._markers.warnings()
        if self._num_json_answers:
            self.warnings.append(
                f"{self._num_json_answers:,} answers are lists or objects and are learnt as JSON; a path in "
                "data.response_field takes one item, e.g. answers.0"
            )
        if ignored := self._parser.ignored_keys:
            keys = ", ".join(f"{key} ({count:,} turns)" for key, count in ignored.most_common(10))
            self.warnings.append(f"keys of turns that nothing reads: {keys}")
        if self.unread:
            listed = [f'"{path}" (in {count:,} rows)' for path, count in self.unread.items()]
            num_hidden = len(listed) - _MAX_FIELD_NAMES
            columns = ", ".join(listed[:_MAX_FIELD_NAMES]) + (f" and {num_hidden} more" if num_hidden > 0 else "")
            progress.say(f"{self._source}: columns with text that nothing reads: {columns}")
        for warning in self.warnings:
            progress.say(f"{self._source}: {warning}")

        if self._last_layout and (
            refusal := explain_refusal(self._source, self._unread, self._last_layout, self._names)
        ):
            raise UsageError(refusal)


def read_rows(folder: Path, config: DataConfig, source: str) -> Iterator[RawRow]:
    """Yield every row of every file, as `RowReader.rows` does."""
    return RowReader(folder, config, source).rows()


def _language(fields: Mapping[str, object], config: DataConfig) -> str | None:
    """Return the row's language tag, in lower case; any other value could be personal data and is left out."""
    value = value_at(fields, config.language_field) if config.language_field else None
    return value.lower() if isinstance(value, str) and _LANGUAGE.fullmatch(value) else None


def _field_error(file: str, path: str, names: Iterable[str], columns: Columns) -> UsageError:
    """Return the error for a file without a required field; it lists the fields that the file has."""
    paths = [
        name for field, values in columns.items() for name, _ in leaf_paths({field: values[0] if values else None})
    ]
    fault = "no row has a value in the field" if path in paths else "there is no field"
    return UsageError(
        f'{file}: {fault} "{shorten(path)}"; the fields are: {describe_fields(columns)}'
        f"{did_you_mean(path, [*paths, *names])} "
        "(set data.prompt_field or data.prompt_template with data.response_field, or data.messages_field)"
    )


def _sample(records: Iterator[Record]) -> list[Record]:
    """Take the first records."""
    sample, num_characters = list[Record](), 0
    while len(sample) < SAMPLE_ROWS and num_characters < _SAMPLE_CHARACTERS and (record := next(records, None)):
        sample.append(record)
        num_characters += count_characters(record.fields, _SAMPLE_CHARACTERS)
    return sample
