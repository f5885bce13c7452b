"""Rows and scores are read as they were written; an id names one row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.evaluation.rows import read_rows

CALL = {"type": "function", "function": {"name": "track", "arguments": {}}}
TOOLS = [{"type": "function", "function": {"name": "track"}}]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_has_its_turns_language_and_tools(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    path = write(
        tmp_path / "eval.jsonl",
        {"id": "1", "messages": messages, "tools": TOOLS, "language": "de"},
        {"id": "2", "messages": messages},
    )
    first, second = read_rows(path, "eval")
    assert (first.id, first.suite, first.messages, first.language, first.tools) == ("1", "eval", messages, "de", TOOLS)
    assert (second.language, second.tools) == (None, None)


def test_two_rows_of_one_id_are_damage(tmp_path: Path) -> None:
    rows = [{"id": name, "messages": []} for name in ("a", "b", "a")]
    with pytest.raises(IntegrityError, match=r"eval\.jsonl:3: has the id of line 1"):
        read_rows(write(tmp_path / "eval.jsonl", *rows), "eval")


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"eval\.jsonl:2: the line is not a row"):
        read_rows(write(tmp_path / "eval.jsonl", {"id": "a", "messages": []}, {"id": "b"}), "eval")
