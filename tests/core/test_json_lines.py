r"""JSON lines: what is written is read back, whatever the texts hold; a line ends at `\n` and nowhere else."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_retrain.core import json_lines
from qlora_retrain.core.errors import IntegrityError

# Every character at which `str.splitlines` cuts.
LINE_BREAKS = ("\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")
TEXTS = st.lists(st.sampled_from([*LINE_BREAKS, "a", "\u00e9", "\U0001f600", '"', "\\", "\ufeff"])).map("".join)


def test_the_line_breaks_of_these_tests_are_all_that_splitlines_knows() -> None:
    characters = {chr(code) for code in range(0x110000) if len(f"a{chr(code)}b".splitlines()) == 2}
    assert characters == {text for text in LINE_BREAKS if len(text) == 1}


@settings(max_examples=60, deadline=None)
@given(records=st.lists(st.dictionaries(TEXTS, TEXTS, max_size=2), max_size=4))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]]) -> None:
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    json_lines.write(path, records)
    assert list(json_lines.read(path)) == list(enumerate(records, 1))
    # Even a tool that cuts at every one of these characters finds whole rows.
    assert [json.loads(line) for line in path.read_bytes().decode().splitlines()] == records


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), end=st.sampled_from(["\n", "\r\n"]))
def test_lines_that_others_wrote_are_cut_at_their_ends_alone(texts: list[str], end: str) -> None:
    """JSON may hold U+2028 and its like as they are, as other writers leave them."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    data = "".join(line + end for line in lines).encode()
    assert list(json_lines.iter_lines(io.BytesIO(data))) == list(enumerate(lines, 1))
    assert json_lines.split_lines(data.decode()) == lines


@pytest.mark.parametrize(
    ("text", "lines"),
    [("", []), ("a", ["a"]), ("a\n", ["a"]), ("a\n\nb", ["a", "", "b"]), ("\n", [""]), ("a\r\nb\rc\n", ["a", "b\rc"])],
)
def test_a_text_is_cut_into_the_lines_that_a_file_of_it_has(tmp_path: Path, text: str, lines: list[str]) -> None:
    assert json_lines.split_lines(text) == lines
    assert [line for _, line in json_lines.iter_lines(io.BytesIO(text.encode()))] == lines
    (tmp_path / "text").write_bytes(text.encode())
    assert list(json_lines.read_lines(tmp_path / "text")) == [(n, t) for n, t in enumerate(lines, 1) if t]


def test_half_a_surrogate_pair_is_written_as_json_can_say_it(tmp_path: Path) -> None:
    record = {"text": "a\ud800b\U0001f600"}
    json_lines.write(tmp_path / "rows.jsonl", [record])
    assert [row for _, row in json_lines.read(tmp_path / "rows.jsonl")] == [record]


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert list(json_lines.read(tmp_path / "rows.jsonl")) == [(1, {"a": 1})]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"[1]", "rows.jsonl:3: expected a JSON object, found list"),
        (b'{"a": ', "rows.jsonl:3: the line is not JSON: Expecting value"),
        (b'{"a": "\xe9"}', "rows.jsonl: the file is not UTF-8"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n\n' + damage + b"\n")
    with pytest.raises(IntegrityError, match=re.escape(message)):
        list(json_lines.read(tmp_path / "rows.jsonl"))
