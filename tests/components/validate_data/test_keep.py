"""Rows are kept by their values, whatever type the format gives them; a setting that no row meets is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.validate_data.keep import is_same
from components.validate_data.raw_rows import RawRow, RowReader
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

ROW = {"question": "Open?", "answer": "No."}


def read(folder: Path, extras: list[dict[str, Any]], keep: dict[str, Any], source: str = "raw_data") -> list[RawRow]:
    (folder / "a.jsonl").write_text("".join(json.dumps({**ROW, **extra}) + "\n" for extra in extras), encoding="utf-8")
    return list(RowReader(folder, DataConfig(keep=keep), source).rows())


def refusal(folder: Path, extras: list[dict[str, Any]], keep: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        read(folder, extras, keep)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (True, True, True), (1, True, True), ("True", True, True), ("0", False, True), ("no", True, False),
        (False, True, False), (None, False, False), ("3", 3, True), ("3.0", 3, True), (3.0, 3, True), ("x", 3, False),
        (3, "3", True), (True, "true", True), ("de", "de", True), ("DE", "de", False), ([1], "[1]", True),
    ],
)  # fmt: skip
def test_a_value_is_compared_by_what_it_says(value: object, expected: str | int | bool, same: bool) -> None:
    assert is_same(value, expected) is same


def test_rows_with_other_values_are_left_out_and_counted_apart(tmp_path: Path) -> None:
    extras = [{"ok": True, "meta": {"lang": "de"}}, {"ok": False, "meta": {"lang": "de"}}, {"ok": True}]
    faults = [row.fault for row in read(tmp_path, extras, {"ok": True, "meta.lang": "de"})]
    assert faults == [None, "not_kept", "not_kept"]


def test_a_misspelt_field_is_refused_with_the_near_one(tmp_path: Path) -> None:
    message = refusal(tmp_path, [{"quality": "high"}] * 3, {"qualty": "high"})
    assert "data.keep: no row has a value in the field qualty; did you mean quality?" in message


def test_a_value_that_no_row_has_is_refused_with_the_types_and_the_near_one(tmp_path: Path) -> None:
    message = refusal(tmp_path, [{"split": "train"}, {"split": "test"}, {"split": 3}], {"split": "trian"})
    assert "no row has trian (text) in the field split; its values are text in 2 rows, a number in 1 rows" in message
    assert message.endswith("did you mean train?")


def test_a_golden_file_may_lack_the_field_since_someone_chose_its_rows(tmp_path: Path) -> None:
    assert [row.fault for row in read(tmp_path, [{}, {"ok": False}], {"ok": True}, "golden_data")] == [None, "not_kept"]
