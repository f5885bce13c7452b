"""A record: the fields of one row as its file states them, before anyone looks for a chat in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file, or the reason why the file has no such row there.

    Attributes:
        file: The path below the source's folder.
        number: The line on which the row begins, from 1; where a file has no lines, the number of the row.
        fields: The row's values by their names. A CSV file has text alone; the others have JSON's types. None: a fault.
        fault: The reason code of a row that has no fields.
        detail: Free words about the fault for a message; never a part of the row's text.
        is_padded: Whether the format gives each object the fields of all, with null where it has none.
    """

    file: str
    number: int
    fields: Mapping[str, object] | None
    fault: str | None = None
    detail: str = ""
    is_padded: bool = False
