"""Rows that are not one example each: the refusal says what they are, and what to write instead."""

from __future__ import annotations

from typing import Any

import pytest

from components.validate_data.field_names import columns_of
from components.validate_data.row_shapes import explain_shape

NODE = {"id": "a", "message": {"author": {"role": "user"}}, "parent": None, "children": ["b"]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "the rows are tokens"),
        ({"role": "user", "content": "hello"}, "each row is one turn"),
        ({"user": "U01", "text": "hello", "ts": "1700.1", "type": "message"}, "each row is one turn"),
        ({"author_id": "7", "text": "hello", "in_response_to_tweet_id": "3"}, "each row is one turn"),
        ({"title": "x", "mapping": {"a": NODE, "b": NODE}}, "mapping is a tree of turns"),
        (
            {"title": "Paris", "paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}] * 3}] * 2},
            "a list of rows in paragraphs.0.qas",
        ),
        (
            {"story": "s", "questions": ["a?", "b?"], "answers": {"input_text": ["a", "b"]}},
            "a list of rows in questions",
        ),
        ({"system": "SYSTEM: -", "chat": "USER: a\n\n\nASSISTANT: <functioncall> {}"}, "chat holds calls as text"),
        (
            {"segments": [{"label": False, "text": "<s>hi"}, {"label": True, "text": "hello</s>"}]},
            "segments holds parts",
        ),
        ({"tag": "greeting", "patterns": ["hi", "hello"], "responses": ["hey", "ho"]}, "a list of rows in patterns"),
        ({"image": "train/a.png", "ground_truth": {"name": "lamp"}}, "each row goes with a medium (image)"),
        ({"prompt": "Write a story.", "response": "", "country": "India"}, "response is empty in every row"),
    ],
)
def test_what_no_setting_reads_is_named(row: dict[str, Any], words: str) -> None:
    assert words in str(explain_shape(columns_of([row, row])))


@pytest.mark.parametrize(
    "row",
    [
        {"user": "hello", "assistant": "hi", "ts": "1700.1"},
        # A text with its author and its day is a text.
        {"author": "Ann", "text": "The museum opened in 1907.", "date": "2026-01-01"},
        {"instruction": "a", "instances": [{"input": "b", "output": "c"}]},
        {"mapping": {"a": 1}, "text": "b"},
        {"prompt": "Write a story.", "response": "", "gpt": "Once."},
        {"image": "https://a/b.png", "text": "A horse"},
    ],
)
def test_rows_that_may_be_examples_are_not_refused_for_their_shape(row: dict[str, Any]) -> None:
    assert explain_shape(columns_of([row, row])) is None
