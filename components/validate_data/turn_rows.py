"""Put rows of one turn each together, where a column says to which conversation each of them belongs.

The rows of a conversation stand one behind the other, in the order of its turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from components.validate_data.field_names import Columns, named
from components.validate_data.readers.record import Record
from components.validate_data.turns import turn_keys
from components.validate_data.values import folded, shorten
from qlora_retrain.core.errors import UsageError

_CONVERSATIONS = (
    "conversationid conversation convid conversationno dialogueid dialogid dialogue dialog sessionid threadid chatid"
).split()
_PLACES = frozenset("turn turnid turnindex turnno turnnumber position messageindex utteranceidx utteranceindex".split())


def conversation_field(columns: Columns) -> str | None:
    """Return the column that says to which conversation a row's turn belongs; None where a row is no turn."""
    turn = {name: values[0] for name, values in columns.items() if values and isinstance(values[0], str)}
    fields = [name for name in named(columns, _CONVERSATIONS) if isinstance(columns[name][0], str | int)]
    if None in turn_keys({name: value for name, value in turn.items() if name not in fields}):
        return None
    return next((name for name in fields if len(set(map(str, columns[name]))) < len(columns[name])), None)


def join_turns(records: Iterable[Record], field: str) -> Iterator[Record]:
    """Yield a record for each conversation, with its rows as the turns in `messages`.

    A broken row is a fault of the conversation in which it stands.

    Raises:
        UsageError: If the rows of a conversation are not together, or not in order.
    """
    finished: set[str] = set()
    for rows in _conversations(records, field):
        if fault := next((row for row in rows if row.fields is None), None):
            yield fault
            continue
        name = str((rows[0].fields or {}).get(field))
        if name in finished:
            raise UsageError(
                f"{rows[0].file}:{rows[0].number}: the rows of one value of {shorten(field)} are not together; sort "
                "the file by it, and within it by the order of the turns"
            )
        finished.add(name)
        yield _join(rows, field)


def _conversations(records: Iterable[Record], field: str) -> Iterator[list[Record]]:
    rows: list[Record] = []
    name: object = None
    for record in records:
        if rows and record.fields is not None and record.fields.get(field) != name:
            yield rows
            rows = []
        name = name if record.fields is None else record.fields.get(field)
        rows.append(record)
    if rows:
        yield rows


def _join(rows: list[Record], field: str) -> Record:
    turns = [dict(row.fields or {}) for row in rows]
    for name in turns[0]:
        places = [turn.get(name) for turn in turns] if folded(name) in _PLACES else []
        numbers = [float(str(place)) for place in places if str(place).replace(".", "", 1).isdigit()]
        if numbers != sorted(numbers):
            raise UsageError(
                f"{rows[0].file}:{rows[0].number}: the turns are not in the order of {shorten(name)}; sort the file by "
                f"{shorten(field)} and {shorten(name)}"
            )

    # What all turns say is said of the conversation.
    shared = {
        name: value
        for name, value in turns[0].items()
        if name not in turn_keys(turns[0]) and all(turn.get(name) == value for turn in turns)
    }
    messages = [{name: value for name, value in turn.items() if name not in shared} for turn in turns]
    return Record(rows[0].file, rows[0].number, {**shared, "messages": messages})
