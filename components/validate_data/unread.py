"""Notice the text columns that nothing reads, and refuse them where they seem to be part of the prompt.

A column is part of the prompt where it varies among rows with one and the same prompt: with the columns that are read
alone, the model could not tell these rows apart. So is one whose name says so, and one with a few long texts that many
rows share, as instructions are. A column whose text is in the chat anyway is none. Only hashes of texts are remembered.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from components.validate_data.field_names import CHATS, RESPONSES, is_prompt_part, stem
from components.validate_data.layouts import Layout
from components.validate_data.values import folded, is_empty, leaf_paths, shorten, text_of
from components.validate_data.verdicts import Verdicts

# Numbers, dates and times are no texts, even where a CSV file writes them as text.
_NO_TEXT = re.compile(r"[\d\s.,:;+\-/%TZ()e$€]*|(?i:true|false|none|null|nan|n/a)")
_IDENTIFIER = re.compile(r"\S*[\d/@\\]\S*|\S{41,}")
# Of a chat that is not under a usual name, these may be the answer.
_CHAT_ANSWERS = (*RESPONSES, "summary", "highlights")
# Columns that say how a row is to be rendered or learnt, which no text would show.
_SETTINGS = ("chattemplatekwargs", "lossmask")
# Columns that share long texts among rows and are yet no part of a prompt.
_ABOUT_ROWS = re.compile(
    r"original|licen[sc]e|copyright|citation|source|notes?$|comment|explanation|rationale|reason|cot$|thought|prompt|"
    r"answer|response|output|solution|hash|^id|id$|url|path|file|title|model|generator|annot"
)
MIN_CONTAINED_CHARACTERS = 12
MIN_SHARED_WORDS = 6  # of the texts that rows share
MAX_DIFFERENT_FRACTION = 0.2  # of the rows; a column with more different texts shares few
MIN_WORDS = 3  # a column with fewer words a value is a name or a category, not prose
MIN_VARYING_FRACTION = 0.002  # of the rows; fewer may be repetitions of whole rows with another note
_MAX_COLUMNS = 2000  # of a source; nobody reads a longer list
_MAX_PROBES = 1000  # values of a column that are looked at to say what it holds


@dataclass(slots=True)
class _Column:
    filled: int = 0
    words: int = 0
    characters: int = 0
    identifiers: int = 0
    probes: int = 0
    copies: int = 0
    contained: int = 0
    rows: array[int] = field(default_factory=lambda: array("q"))
    hashes: array[int] = field(default_factory=lambda: array("q"))

    @property
    def is_prose(self) -> bool:
        """Return whether the values are sentences, code or the like."""
        return self.words >= MIN_WORDS * self.probes or self.characters >= 40 * self.probes

    @property
    def is_in_chat(self) -> bool:
        """Return whether the chat has most of the texts, or the column repeats the whole chat."""
        return max(self.copies, self.contained) * 10 > self.probes * 9

    @property
    def is_shared(self) -> bool:
        """Return whether rows share a few different texts of some length, as the instructions of several tasks are."""
        num_different = len(set(self.hashes))
        is_long = self.words >= MIN_SHARED_WORDS * self.probes
        return is_long and 1 < num_different <= MAX_DIFFERENT_FRACTION * self.filled

    @property
    def is_identifier(self) -> bool:
        """Return whether most values are numbers of things, addresses or names of files."""
        return self.identifiers * 2 > self.probes


class UnreadColumns:
    """Count the columns that nothing reads, over the files of one source."""

    def __init__(self, ignored: Sequence[str]) -> None:
        self._ignored = frozenset(ignored)
        self._columns: dict[str, _Column] = {}
        self._prompts, self._answers = array("q"), array("q")
        self.verdicts = Verdicts()

    def add(
        self, fields: Mapping[str, object], layout: Layout, prompt: object, answer: object, pieces: Sequence[str]
    ) -> None:
        """Count a row.

        Args:
            fields: All fields of the row.
            layout: What is read of them.
            prompt: What the model is given; rows with an equal one have an equal hash.
            answer: What the model should write.
            pieces: The texts that were read; a column that repeats them all is a copy.
        """
        row = len(self._prompts)
        self._prompts.append(hash(prompt))
        self._answers.append(hash(answer))

        for path, value in _unread_values(fields, {*layout.read, *layout.left_out}, self._ignored):
            # Each row of JSON may have other names.
            if path not in self._columns and len(self._columns) >= _MAX_COLUMNS:
                continue
            self.verdicts.add(path, value)
            # By its name it may be a part of the prompt, whatever it holds, such as a list of numbers to choose from.
            is_part = is_prompt_part(path) or folded(path) in _SETTINGS
            is_part &= isinstance(value, list | Mapping) and not is_empty(value)
            text = text_of(value) if is_part else _text(value)
            if text is None:
                continue
            column = self._columns.setdefault(path, _Column())
            column.filled += 1
            column.rows.append(row)
            column.hashes.append(hash(text))
            if column.probes < _MAX_PROBES:
                column.probes += 1
                column.words += len(text.split())
                column.characters += len(text)
                column.identifiers += _IDENTIFIER.fullmatch(text) is not None
                column.copies += bool(pieces) and all(_repeats(text, piece) for piece in pieces)
                column.contained += _is_in(value, pieces)

    @property
    def counts(self) -> dict[str, int]:
        """Return the columns that nothing reads, with the number of rows that fill each."""
        return {shorten(path): column.filled for path, column in self._columns.items()}

    def varying(self) -> dict[str, int]:
        """Return the columns that vary while the prompt repeats, with the number of rows that they tell apart.

        Prose always counts. A word or a name counts where the answers differ as well: it may be what they depend on.
        """
        repeated = {prompt for prompt, count in Counter(self._prompts).items() if count > 1}
        least = max(2, MIN_VARYING_FRACTION * len(self._prompts))
        counts = {path: self._count_varying(column, repeated) for path, column in self._columns.items()}
        return {path: count for path, count in counts.items() if count >= least}

    def parts(self, prompt_fields: Sequence[str]) -> list[str]:
        """Return the columns that by their names belong to a prompt, and whose text is not in the chat.

        So does the second of two numbered columns of which the first is read, such as `sentence2`.
        """
        stems = {stem(path) for path in prompt_fields} - {None}
        return [
            path
            for path, column in self._columns.items()
            if (is_prompt_part(path) or stem(path) in stems) and not column.is_in_chat
        ]

    def answer(self, layout: Layout) -> str | None:
        """Return the column that holds an answer to a chat, such as a summary; None where the chat has it."""
        if layout.chat is None or folded(layout.chat) in CHATS[:2]:
            return None
        return next(
            (
                path
                for path, column in self._columns.items()
                if folded(path) in _CHAT_ANSWERS and column.is_prose and not column.is_in_chat
            ),
            None,
        )

    def shared(self) -> list[str]:
        """Return the columns with a few long texts that many rows share."""
        return [
            path
            for path, column in self._columns.items()
            if column.is_shared and not column.is_in_chat and not _ABOUT_ROWS.search(folded(path))
        ]

    def repeats(self) -> tuple[int, int]:
        """Return how many rows have a prompt that another row has too, and how many rows there are."""
        return sum(count for count in Counter(self._prompts).values() if count > 1), len(self._prompts)

    def _count_varying(self, column: _Column, repeated: set[int]) -> int:
        """Return how many rows have a repeated prompt for which the column has different values."""
        # A word may stand in a prompt that is about it, and yet not say that it is the one that is asked for.
        is_in_chat = column.is_in_chat if column.is_prose else column.copies * 10 > column.probes * 9
        if is_in_chat or (column.is_identifier and not column.is_prose):
            return 0

        # By prompt: the rows, and the different pairs of a value and, for what is no prose, an answer.
        rows: Counter[int] = Counter()
        values: dict[int, set[int]] = {}
        answers: dict[int, set[int]] = {}
        for row, value in zip(column.rows, column.hashes, strict=True):
            prompt = self._prompts[row]
            if prompt in repeated:
                rows[prompt] += 1
                values.setdefault(prompt, set()).add(value)
                answers.setdefault(prompt, set()).add(self._answers[row])
        return sum(
            count
            for prompt, count in rows.items()
            if len(values[prompt]) > 1 and (column.is_prose or len(answers[prompt]) > 1)
        )


def _unread_values(
    fields: Mapping[str, object], read: set[str], ignored: frozenset[str]
) -> Iterator[tuple[str, object]]:
    """Yield the fields that nothing reads; those of an object of which something is read, by their paths."""
    used = read | ignored
    for name, value in fields.items():
        if name in used:
            continue
        if any(path.startswith(f"{name}.") for path in used):
            for path, item in leaf_paths({name: value}, depth=3):
                if path not in used and not any(part.startswith(f"{path}.") for part in used):
                    yield path, item
        else:
            yield name, value


def _repeats(text: str, piece: str) -> bool:
    """Return whether a column's text has the piece, as it is or within JSON."""
    return piece.strip() in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text


def _is_in(value: object, pieces: Sequence[str]) -> bool:
    """Return whether every text of a column's value is in the chat; letters and numbers alone are by chance."""
    leaves = [leaf for leaf in _leaves(value) if leaf]
    is_long = sum(map(len, leaves)) >= MIN_CONTAINED_CHARACTERS
    return is_long and all(any(leaf in piece for piece in pieces) for leaf in leaves)


def _leaves(value: object) -> Iterator[str]:
    """Yield the texts in a value, however deep, without the white space around them."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, list | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)


def _text(value: object) -> str | None:
    """Return the text of a value that holds one, or None."""
    if isinstance(value, str):
        return value if value.strip() and not _NO_TEXT.fullmatch(value.strip()) else None
    if is_empty(value) or not isinstance(value, list | Mapping):
        return None
    items = value.values() if isinstance(value, Mapping) else value
    return text_of(value) if any(_text(item) is not None for item in items) else None
