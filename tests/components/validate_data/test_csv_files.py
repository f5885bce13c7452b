"""CSV as programs write it; what has no header, or a quote that does not close, is refused with its line."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from components.validate_data.files import Record

ReadFiles = Callable[..., list[Record]]
RefuseFiles = Callable[..., str]
ROWS = [{"text": "Where is my card, please?", "label": "card_arrival"}, {"text": "I pay; you wait", "label": "top_up"}]


@pytest.mark.parametrize(
    "text",
    [
        'text,label\n"Where is my card, please?",card_arrival\nI pay; you wait,top_up\n',
        'text;label\nWhere is my card, please?;card_arrival\n"I pay; you wait";top_up\n',
        "text\tlabel\nWhere is my card, please?\tcard_arrival\nI pay; you wait\ttop_up\n",
        "text|label\nWhere is my card, please?|card_arrival\nI pay; you wait|top_up\n",
        'sep=;\ntext;label\nWhere is my card, please?;card_arrival\n"I pay; you wait";top_up\n',
        '"sep=|"\r\ntext|label\r\nWhere is my card, please?|card_arrival\r\nI pay; you wait|top_up\r\n',
        'sep=^\ntext^label\nWhere is my card, please?^card_arrival\n"I pay; you wait"^top_up\n',
        'text,label\r"Where is my card, please?",card_arrival\rI pay; you wait,top_up\r',
        'text,label\r\n"Where is my card, please?",card_arrival\r\n\r\nI pay; you wait,top_up',
        '\ufefftext,label\n"Where is my card, please?",card_arrival\nI pay; you wait,top_up\n',
        'text, label\n"Where is my card, please?", "card_arrival"\nI pay; you wait, top_up\n',
        ',text,label\n0,"Where is my card, please?",card_arrival\n1,I pay; you wait,top_up\n',
        'text,label,,\n"Where is my card, please?",card_arrival,,\nI pay; you wait,top_up,,\n',
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_the_file_says_how_its_fields_are_separated(read_files: ReadFiles, text: str, suffix: str) -> None:
    assert [record.fields for record in read_files({f"a.{suffix}": text})] == ROWS


def test_a_header_decides_where_rows_hold_other_signs(read_files: ReadFiles) -> None:
    text = "text;label\n" + "".join(f"one, two, three {i};a\n" for i in range(9))
    assert read_files({"a.csv": text})[0].fields == {"text": "one, two, three 0", "label": "a"}
    # Both signs stand in the header; the rows have as many fields as one of them says.
    assert read_files({"a.csv": "text,a|b\nhi,ho\nhi,ho\n"})[0].fields == {"text": "hi", "a|b": "ho"}
    # The field that the line names says which.
    assert read_files({"a.csv": "a,b|text\nx,hi|ho\n"}, text_field="text")[0].fields == {"a,b": "x,hi", "text": "ho"}


def test_a_single_column_is_no_fault(read_files: ReadFiles) -> None:
    assert read_files({"a.csv": "text\nhello\n"})[0].fields == {"text": "hello"}


def test_a_column_without_a_name_that_holds_text_is_not_lost(read_files: ReadFiles) -> None:
    assert read_files({"a.csv": "text,\nhi,ho\n"})[0].fields == {"text": "hi", "column 2": "ho"}


def test_rows_are_numbered_by_the_line_they_begin_on(read_files: ReadFiles) -> None:
    records = read_files({"a.csv": 'sep=,\ntext,label\n"two\r\nlines",refund\n\nlast,login\n'})
    assert [record.number for record in records] == [3, 6]
    assert records[0].fields == {"text": "two\r\nlines", "label": "refund"}


def test_rows_with_too_many_or_too_few_fields_are_faults_of_their_own(read_files: ReadFiles) -> None:
    records = read_files({"a.csv": "text,label\na,b,c\nhi,refund\nx\n"})
    assert [record.fault for record in records] == ["ragged_row", None, "ragged_row"]
    assert records[0].detail == "3 fields, and the header has 2"


def test_a_header_that_comes_again_is_no_row(read_files: ReadFiles) -> None:
    """As where two files were joined, each with its byte order mark."""
    part = "\ufefftext,label\nhi,refund\n"
    assert [record.fault for record in read_files({"a.csv": part * 3})] == [
        None, "repeated_headers", None, "repeated_headers", None,
    ]  # fmt: skip
    settings = {"checks": {"repeated_headers": "off"}}
    assert read_files({"a.csv": part * 2}, **settings)[1].fields == {"text": "\ufefftext", "label": "label"}


def test_a_header_is_known_in_whatever_the_joined_files_became(read_files: ReadFiles) -> None:
    rows = [{"text": "hi", "label": "refund"}, {"text": "text", "label": "label"}, {"text": "text", "label": "x"}, {}]
    records = read_files({"b.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    assert [record.fault for record in records] == [None, "repeated_headers", None, None]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Where is my card?,card_arrival\nMy card is lost,lost_card\n", "field 1 is a sentence"),
        ("1,hello,greeting\n2,bye,parting\n", "field 1 is a number"),
        ("hello,greeting\nhi,greeting\nhey,greeting\n", "the value of field 2 comes again in 2 of the next rows"),
        ("hello " * 20 + ",greeting\nhi,greeting\n", "field 1 has 119 characters"),
    ],
)
def test_a_file_without_a_header_is_refused_with_the_way_out(refuse_files: RefuseFiles, text: str, reason: str) -> None:
    message = refuse_files({"a.csv": text})
    assert message.startswith(f"a.csv:1: the first line is no header: {reason}")
    assert "cat a.csv" in message
    # Google Forms writes the questions as names.
    assert "if these are the names, set data.prompt_field and data.response_field to two of them" in message
    # Nothing of a row is repeated.
    assert "card?" not in message
    assert "hello" not in message


def test_a_header_that_the_line_names_is_one(read_files: ReadFiles) -> None:
    text = "text,What is it?\nhi,a\n"
    assert read_files({"a.csv": text}, prompt_field="text", response_field="What is it?")[0].fields == {
        "text": "hi",
        "What is it?": "a",
    }


def test_two_columns_of_one_name_are_refused(refuse_files: RefuseFiles) -> None:
    message = refuse_files({"a.csv": "text,label,text\nhi,refund,ho\n"})
    assert 'a.csv:1: more than one column has the name "text": columns 1 and 3' in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'text,label\nhi,refund\n"never closed,login\nx,y\n',
            "a.csv:3: not valid CSV (unexpected end of data); close the",
        ),
        (
            'text,label\n"say \\"hi\\", then",login\n',
            "a.csv:2: not valid CSV (',' expected after '\"'); a quote inside",
        ),
        ("text,label\nhi\rho,refund\nx,y\n", "a.csv:2: not valid CSV (new-line character seen in unquoted field"),
    ],
)
def test_quotes_and_line_ends_that_do_not_fit_are_refused_with_their_row(
    refuse_files: RefuseFiles, text: str, message: str
) -> None:
    assert refuse_files({"a.csv": text}).startswith(message)


def test_the_command_for_escaped_quotes_mends_them(refuse_files: RefuseFiles, read_files: ReadFiles) -> None:
    text = 'text,label\n"say \\"hi\\", then",login\n'
    command = re.search("`(.*)`", refuse_files({"a.csv": text}))
    assert command is not None
    shell = command[1].replace("> a.csv.csv", "").replace("< a.csv", "")
    mended = subprocess.run(shell, shell=True, input=text.encode(), capture_output=True, check=True).stdout
    assert read_files({"a.csv": mended})[0].fields == {"text": 'say "hi", then', "label": "login"}


def test_a_quote_in_a_file_with_tabs_is_a_character_like_any_other(read_files: ReadFiles) -> None:
    """Read as quoting, the second row would swallow the third."""
    text = 'text\tlabel\nsay "hi"\ta\n"open\tb\nplain\tc\nclosed"\td\n'
    texts = [record.fields and record.fields["text"] for record in read_files({"a.tsv": text})]
    assert texts == ['say "hi"', '"open', "plain", 'closed"']
    # Where fields are quoted, they are read so.
    assert read_files({"a.tsv": 'text\tlabel\n"two\nlines ""and"" a quote"\ta\n'})[0].fields == {
        "text": 'two\nlines "and" a quote',
        "label": "a",
    }


def test_a_quote_that_swallows_rows_behind_the_first_ones_is_refused(
    refuse_files: RefuseFiles, read_files: ReadFiles, tmp_path: Path
) -> None:
    rows = [f'"quoted {i}"\ta\n' for i in range(300)]
    rows[250:253] = ['"open\tb\n', "plain\tc\n", 'closed"\td\n']
    message = refuse_files({"a.tsv": "text\tlabel\n" + "".join(rows)})
    assert message.startswith("a.tsv:252: the quote that opens there closes some lines further down")
    command = re.search("`(.*)`", message)
    assert command is not None
    subprocess.run(command[1], shell=True, check=True, cwd=tmp_path / "source")
    (tmp_path / "source" / "a.tsv").unlink()
    texts = [record.fields and record.fields["text"] for record in read_files({})]
    assert texts[250:253] == ['"open', "plain", 'closed"']


def test_what_is_unusual_about_a_text_is_said(read_files: ReadFiles, capsys: pytest.CaptureFixture[str]) -> None:
    read_files({"a.csv": "text;label\rhi;ho\r".encode("utf-16")})
    assert capsys.readouterr().out.split("\n")[:3] == [
        "a.csv: the text is read as UTF-16",
        "a.csv: carriage returns alone end the lines",
        "a.csv: the fields are separated by semicolons",
    ]
