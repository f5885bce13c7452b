"""Rows of one turn each become the chats that a column names; rows that are not in order are refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from components.validate_data.raw_rows import RawRow, RowReader
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

CHATS = [[f"Hall {i}?", f"Closed, {i}.", f"And {i + 1}?", "Open."] for i in range(3)]


def turns() -> list[dict[str, Any]]:
    return [
        {"conversation_id": f"c{i}", "turn": j, "speaker": ("Human", "bot")[j % 2], "text": text, "topic": f"halls {i}"}
        for i, chat in enumerate(CHATS)
        for j, text in enumerate(chat)
    ]


def read(folder: Path, name: str, content: str, **settings: Any) -> list[RawRow]:
    (folder / name).write_text(content, encoding="utf-8")
    return list(RowReader(folder, DataConfig(**settings), "raw_data").rows())


def as_lines(rows: list[Any]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def as_csv(rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", as_lines(turns())), ("a.csv", as_csv(turns()))])
def test_rows_of_one_turn_each_are_put_together(tmp_path: Path, name: str, content: str) -> None:
    raw_rows = read(tmp_path, name, content, system_field="topic")
    assert [[(m["role"], m["content"]) for m in raw.messages] for raw in raw_rows] == [  # type: ignore[attr-defined]
        [("system", f"halls {i}"), *zip(("user", "assistant") * 2, chat, strict=True)] for i, chat in enumerate(CHATS)
    ]
    # By the line of the first turn.
    first = 1 if name == "a.jsonl" else 2
    assert [raw.number for raw in raw_rows] == [first, first + 4, first + 8]


def test_rows_that_are_not_together_or_not_in_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.jsonl:4: the rows of one value of conversation_id are not together"):
        read(tmp_path, "a.jsonl", as_lines(sorted(turns(), key=lambda row: row["turn"])))
    with pytest.raises(UsageError, match=r"a\.jsonl:1: the turns are not in the order of turn; sort the file by"):
        read(tmp_path, "a.jsonl", as_lines(turns()[::-1]))


def test_a_broken_turn_is_a_fault_of_its_conversation_alone(tmp_path: Path) -> None:
    rows: list[Any] = turns()
    rows[5] = '{"conversation_id": "c1", '
    assert [raw.fault for raw in read(tmp_path, "a.jsonl", as_lines(rows))] == [None, "bad_json_line", None]


def test_rows_that_only_look_like_turns_are_left_alone(tmp_path: Path) -> None:
    pairs = [{"conversation_id": i, "prompt": f"Hall {i}?", "completion": "Closed."} for i in range(4)]
    assert len(read(tmp_path, "a.jsonl", as_lines(pairs))) == 4
    # Each turn is a conversation of its own, so that nothing says which belong together.
    with pytest.raises(UsageError, match="each row is one turn"):
        read(tmp_path, "a.jsonl", as_lines([{**row, "conversation_id": i} for i, row in enumerate(turns())]))
