"""Check the reading of reference text in its three forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_retrain.core.errors import UsageError
from qlora_retrain.evaluation import reference_text

CHAT = [{"role": "user", "content": "four?"}, {"role": "assistant", "content": "five"}]


def test_paragraphs_texts_and_chats_are_passages(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nline\n\n  \ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n' + json.dumps({"messages": CHAT}) + "\n")
    # Other files of the folder, such as a licence, are ignored.
    (tmp_path / "README.md").write_text("not a passage")
    assert reference_text.read_passages(tmp_path) == ["one\nline", "two", "three", CHAT]


def test_the_same_passage_twice_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\none\n\ntwo\n")
    assert reference_text.read_passages(tmp_path) == ["one", "two"]


@pytest.mark.parametrize(
    "line", ["not json", '{"body": "x"}', '{"text": 3}', "[1]", '{"messages": [{"role": "user", "content": "x"}]}']
)
def test_an_error_names_the_line_that_has_another_form(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UsageError, match=r"a.jsonl:2"):
        reference_text.read_passages(tmp_path)
