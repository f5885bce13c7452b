"""`ask-golden`: which answers are right, what the files of questions may hold, and what a log shows of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_retrain.cli import ask, golden, main
from qlora_retrain.cli.golden import GoldenQuestion

ASK = "where is order 7"


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pulled version: the tiny model, and a recipe with a system turn."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "recipe.json").write_text(json.dumps({"steps": {"validate_data": {"system": "order"}}}))
    shutil.copytree(tiny_model, folder / "model")
    return folder


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main.main(["ask-golden", *map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_it_asks_as_ask_does_and_counts_the_right_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (expected,) = ask.answers(folder, ask.Questions([ASK], None, 8))
    chat = [{"role": "user", "content": ASK}, {"role": "assistant", "content": expected.text}]
    right = {"question": ASK, "answer": f"  {expected.text} "}
    part = {"question": ASK, "contains": expected.text.split()[0].upper()}
    wrong = {"question": ASK, "answer": "secret words"}
    questions = write(tmp_path / "questions.jsonl", right, part, {"messages": chat}, wrong)
    report = tmp_path / "report.jsonl"

    options = (folder, questions, "--max-new-tokens", 8, "--report", report)
    assert run(*options, "--min-right-fraction", 0.75, "--no-text") == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("questions.jsonl:4: a wrong answer\n3 of 4 answers are right\n")
    assert "secret" not in printed.out + printed.err
    records = [json.loads(line) for line in report.read_text().splitlines()]
    assert [record["right"] for record in records] == [True, True, True, False]
    assert records[3] == {"line": 4, "right": False, "expected": "secret words", "answer": expected.text}

    # A system turn of the question's own comes before that of the training, and changes what is asked.
    own = [{"role": "system", "content": "order"}, *chat]
    assert run(folder, write(questions, {"messages": own}), "--max-new-tokens", 8) == 0

    assert run(folder, write(questions, right, wrong), "--max-new-tokens", 8) == 11
    printed = capsys.readouterr()
    assert f"questions.jsonl:2: a wrong answer: expected 'secret words', found {expected.text!r}" in printed.out
    assert printed.err.endswith("qlora-retrain: 1 of 2 answers are right; at least 2 must be\n")


@pytest.mark.parametrize(
    "row",
    [
        [],
        {},
        {"question": ASK},
        {"question": " ", "answer": "a"},
        {"question": ASK, "answer": "a", "contains": "b"},
        {"question": ASK, "answer": "a", "note": "b"},
        {"question": ASK, "answer": ""},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        {"messages": "ab"},
    ],
    ids=str,
)
def test_a_line_that_is_no_golden_question_is_refused_with_its_number(
    row: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write(tmp_path / "questions.jsonl", {"question": ASK, "answer": "a"}, row)
    assert run(tmp_path, questions) == 12
    assert "questions.jsonl:2: " in capsys.readouterr().err


def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, no_text = write(tmp_path / "empty.jsonl"), tmp_path / "bytes.jsonl"
    no_text.write_bytes(b"\xff\n")
    for path, words in (
        (empty, "expected 1 to 10000 golden questions, found 0"),
        (no_text, "the file is not UTF-8"),
        (tmp_path / "absent.jsonl", "cannot be read: No such file"),
    ):
        assert run(tmp_path, path) == 12
        assert words in capsys.readouterr().err
    assert run(tmp_path, empty, "--min-right-fraction", 2) == 12


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write(tmp_path / "questions.jsonl", {"question": ASK, "answer": "x"})
    for report in (tmp_path / "missing/report.jsonl", tmp_path):
        # There is no model either, and that would be said later.
        assert run(tmp_path / "no-model", questions, "--report", report) == 12
        assert "expected a file in a folder that exists" in capsys.readouterr().err


def test_white_space_does_not_count_and_case_does_only_for_a_whole_answer() -> None:
    whole = GoldenQuestion(1, (), "In  transit\n")
    assert [whole.is_right(text) for text in (" In transit", "in transit", "In transit.")] == [True, False, False]
    part = GoldenQuestion(1, (), "In  transit\n", is_part=True)
    assert [part.is_right(text) for text in ("It is IN TRANSIT.", "It is lost.")] == [True, False]
    assert golden.Answered(part, "in transit").is_right
