"""Keys of artifacts: one canonical JSON, one hash."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_retrain.core import hashing

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), JSON, max_size=4))
def test_the_order_of_fields_does_not_matter_and_nothing_is_lost(value: dict[str, object]) -> None:
    assert hashing.canonical_json(dict(reversed(value.items()))) == hashing.canonical_json(value)
    assert json.loads(hashing.canonical_json(value)) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf]])
def test_a_value_that_json_cannot_hold_has_no_key(value: object) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        hashing.sha256_json(value)


def test_the_hash_is_sha256_of_the_canonical_json() -> None:
    assert hashing.canonical_json({"b": 1, "a": ["ü", 0.0001]}) == '{"a":["ü",0.0001],"b":1}'.encode()
    expected = hashlib.sha256('{"a":["ü",0.0001],"b":1}'.encode()).hexdigest()
    assert hashing.sha256_json({"b": 1, "a": ["ü", 0.0001]}) == expected


def test_each_part_of_a_step_changes_its_key() -> None:
    base = hashing.step_key("s", {"a": 1}, {"x": "k", "y": None}, "c")
    others = [
        hashing.step_key("t", {"a": 1}, {"x": "k", "y": None}, "c"),
        hashing.step_key("s", {"a": 2}, {"x": "k", "y": None}, "c"),
        hashing.step_key("s", {"a": 1}, {"x": "k2", "y": None}, "c"),
        hashing.step_key("s", {"a": 1}, {"x": "k", "y": "k"}, "c"),
        hashing.step_key("s", {"a": 1}, {"x": "k", "y": None}, "d"),
    ]

    assert len({base, *others}) == 6
    assert base == hashing.step_key("s", {"a": 1}, {"y": None, "x": "k"}, "c")


def test_a_files_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    # More than one chunk of 1 MiB.
    data = bytes(range(256)) * 9000
    (tmp_path / "f").write_bytes(data)
    assert hashing.sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest() == hashing.sha256_bytes(data)


def test_a_content_hash_ignores_the_order_of_files() -> None:
    files = [("a", "1"), ("b", "2")]
    assert (
        hashing.content_hash(files)
        == hashing.content_hash(reversed(files))
        == hashing.content_hash(tuple(f) for f in files)
    )
    assert hashing.content_hash(files) != hashing.content_hash([("a", "2"), ("b", "1")])
