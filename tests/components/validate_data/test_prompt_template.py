"""A prompt of several fields: what is empty falls away with its line, what the person wrote stays to the letter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from components.validate_data.prompt_template import PromptTemplate
from components.validate_data.raw_rows import read_rows
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

FULL = {"a": "Translate.", "b": "cat", "c": "de"}


@pytest.mark.parametrize(
    ("template", "empty", "expected"),
    [
        ("{a}\n\n{b}", "", "Translate.\n\ncat"),
        ("{a}\n\n{b}", "b", "Translate."),
        ("{a}\n\n{b}", "a", "cat"),
        ("{a}\n\n{b}\n\nAnswer:", "b", "Translate.\n\nAnswer:"),
        ("{a}\n\n{b}\nAnswer:", "b", "Translate.\n\nAnswer:"),
        ("{a}\n{b}\n{c}", "b", "Translate.\nde"),
        ("{a}\n\n{b}\n\n{c}", "bc", "Translate."),
        ("{a}\n\n{b}\n\n\n{c}\n\n!", "bc", "Translate.\n\n\n!"),
        ("Task: {a}\nInput: {b} ({c})", "b", "Task: Translate.\nInput:  (de)"),
        ("Task: {a}\nInput: {b} ({c})", "bc", "Task: Translate."),
        ("{{{a}}}\n{{}}", "", "{Translate.}\n{}"),
        ("\n{a}\n", "", "\nTranslate.\n"),
        ("{a} {a}", "", "Translate. Translate."),
    ],
)
def test_a_line_whose_fields_are_empty_falls_away(template: str, empty: str, expected: str) -> None:
    values = {name: " " if name in empty else text for name, text in FULL.items()}
    assert PromptTemplate.from_text(template).fill(values.__getitem__) == expected


def test_values_are_put_in_to_the_letter() -> None:
    values = {"a": "{b}\n\n  x\u2028{{", "b": "\ty "}
    assert PromptTemplate.from_text("{a}\n{b}").fill(values.__getitem__) == "{b}\n\n  x\u2028{{\n\ty "


def test_fields_are_named_once_and_may_be_paths() -> None:
    assert PromptTemplate.from_text("{a.b} {c d}\n{a.b}").fields == ("a.b", "c d")
    assert PromptTemplate.from_fields(("a", "b")) == PromptTemplate.from_text("{a}\n\n{b}")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{a", "expected '}'"),
        ("a}", "Single '}'"),
        ("no field", "no field is named"),
        ("{}", "no field is named"),
        ("{a!r}", "a field is its name alone"),
        ("{a:>10}", "a field is its name alone"),
    ],
)
def test_a_template_is_checked_with_the_config(template: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataConfig(prompt_template=template, response_field="x")


def test_a_template_reads_paths_and_an_unknown_field_is_named_with_the_near_one(tmp_path: Path) -> None:
    row = {"task": "Translate.", "translation": {"en": "cat", "de": "Katze"}}
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 2, encoding="utf-8")
    config = DataConfig(prompt_template="{task}\n\n{translation.en}", response_field="translation.de")
    messages = next(read_rows(tmp_path, config, "raw_data")).messages
    assert messages[0] == {"role": "user", "content": "Translate.\n\ncat"}  # type: ignore[index]

    config = DataConfig(prompt_template="{tsak}\n\n{translation.en}", response_field="translation.de")
    with pytest.raises(UsageError, match=r'a\.jsonl: there is no field "tsak"; .* did you mean task\?'):
        list(read_rows(tmp_path, config, "raw_data"))


def test_a_row_without_any_of_the_fields_is_a_fault_of_its_own(tmp_path: Path) -> None:
    rows = [{"q": "Where?", "c": "Here.", "a": "here"}, {"q": "", "c": None, "a": "here"}, {"a": "here"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(prompt_template="{q}\n{c}", response_field="a")
    assert [row.fault for row in read_rows(tmp_path, config, "raw_data")] == [None, "missing_field", "missing_field"]
