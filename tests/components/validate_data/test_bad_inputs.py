"""Every bad input gives exactly its rule and exit code, and nothing that it says is printed or written elsewhere."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from components.validate_data import gate_rows
from components.validate_data.row_checks import FINDERS
from components.validate_data.step import run
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import DataRefused, Exit, UsageError
from tests.components.validate_data.bad_inputs import (
    CANARY,
    CASES,
    LEAKS,
    SETTINGS,
    Case,
    Change,
    Files,
    chat,
    files_of,
    lines,
)

ROW_FILES = ("train.jsonl", "eval.jsonl", "golden.jsonl")
# Written in two parts, so that no scanner of repositories takes them for real.
SECRETS = ("AKIA" + "Q3EGAAAABBBB2222", "jane.doe" + "@example.com", "4111 1111 1111 1111")


def write(folder: Path, files: Files, change: Change) -> Path | None:
    for name, data in files.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(change(data))
    return folder if files else None


def judge(case: Case, folder: Path, base_model: Path, change: Change = bytes) -> UsageError | DataRefused | None:
    """Run the step; return how it refuses."""
    raw = write(folder / "raw", files_of(case), change)
    golden = write(folder / "golden", case.golden, change)
    evaluation = write(folder / "evaluation", case.evaluation, change)
    (folder / "dataset").mkdir()
    assert raw is not None
    try:
        return run(
            DataConfig(**{**SETTINGS, **case.settings}),
            raw_data=raw,
            base_model=base_model,
            golden_data=golden,
            reference_profile=None,
            evaluation_history=None,
            eval_data=evaluation,
            dataset=folder / "dataset",
        ).refused
    except UsageError as error:
        return error


def rules_of(case: Case, problem: UsageError | DataRefused | None, dataset: Path) -> set[str]:
    """Return the rules that show where the case says."""
    if case.kind == "error":
        return {case.rule} if isinstance(problem, UsageError) and case.rule in str(problem) else {str(problem)}
    assert not isinstance(problem, UsageError), problem
    profile: dict[str, Any] = json.loads((dataset / "profile.json").read_text())
    if case.kind == "reason":
        return {json.loads(line)["reason"] for line in (dataset / "quarantine.jsonl").read_text().splitlines()}
    if case.kind == "check":
        return {name for name, entry in profile["checks"].items() if entry["rows"]}
    return {finding["name"] for finding in profile["expectations"] if finding["outcome"] == "refuse"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_gives_exactly_its_rule_and_exit_code(
    case: Case, tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    problem = judge(case, tmp_path, tiny_model)
    assert rules_of(case, problem, tmp_path / "dataset") == {case.rule}, problem
    assert (problem.exit_code if problem else Exit.DONE) == case.code
    if case.kind == "reason" and case.code == Exit.DATA_REFUSED:
        assert f"({case.rule}: " in str(problem)
    assert_says_nothing_of((CANARY,), problem, tmp_path / "dataset", capfd)


def is_printed(case: Case) -> bool:
    """Return whether an error is all that the input gives, and a text of it may be quoted there."""
    files = (files_of(case), case.golden, case.evaluation)
    return case.kind == "error" and any(CANARY.encode() in data for group in files for data in group.values())


def assert_says_nothing_of(
    words: Sequence[str], problem: BaseException | None, dataset: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Assert that no log, error, traceback or file but those of the rows holds one of the words."""
    printed = capfd.readouterr()
    texts = {"out": printed.out, "err": printed.err}
    texts["error"] = "".join(traceback.format_exception(problem)) if problem else ""
    texts |= {path.name: path.read_text() for path in dataset.iterdir() if path.name not in ROW_FILES}
    assert not [(name, word) for name, text in texts.items() for word in words if word in text]


@pytest.mark.parametrize("case", [*(case for case in CASES if is_printed(case)), *LEAKS], ids=lambda case: case.name)
def test_no_secret_and_no_address_is_printed_or_written(
    case: Case, tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = replace(case, settings={**case.settings, "checks": dict.fromkeys(FINDERS, "off")})
    problem = judge(case, tmp_path, tiny_model, lambda data: data.replace(CANARY.encode(), " ".join(SECRETS).encode()))
    assert_says_nothing_of(SECRETS, problem, tmp_path / "dataset", capfd)


@pytest.mark.parametrize(
    ("name", "culprit"),
    [
        ("half of a surrogate pair", 'half of a surrogate pair, which is not valid text (in "messages")'),
        ("a role that nobody knows", 'turn 2: the role "narrator"'),
        ("a text that nothing reads", 'turn 1: the key "text2"'),
        ("null as the chat", 'the field "messages"'),
        ("two values of one name", '("messages")'),
        ("an empty answer", "turn 2, of the assistant"),
        ("a mark of the template", "turn 1 (user) holds '<|im_end|>'"),
        ("contradicting labels", "that row is rows.jsonl:62"),
        ("a weight of two", 'turn 2: a number in "weight"'),
        ("an answer of weight zero alone", "has the weight 0"),
        ("an image in a turn", 'turn 1: a part of type "image_url"'),
    ],
)
def test_a_reason_names_its_culprit(name: str, culprit: str, tmp_path: Path, tiny_model: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    assert culprit in str(judge(case, tmp_path, tiny_model))


def test_a_special_token_of_the_tokenizer_is_named(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<filename>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    case = replace(CASES[-1], raw={"a.jsonl": lines(chat("what is in <filename>"))}, evaluation={})
    message = str(judge(case, tmp_path, tmp_path / "tokenizer"))
    assert "turn 1 (user) holds '<filename>') (mark_in_text: 1 of 61 rows)" in message
    assert "data.marks_in_text: allow" in message


@pytest.mark.parametrize("error", [KeyError, ValueError, TypeError, AssertionError])
def test_a_bug_of_ours_shows_lines_of_code_and_no_value(
    error: type[Exception], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error(CANARY)

    monkeypatch.setattr(gate_rows, "quarantine_repeats", fail)
    case = replace(CASES[-1], raw={}, evaluation={})
    with pytest.raises(RuntimeError, match=f"^{error.__name__}; its message is left out") as caught:
        judge(case, tmp_path, tiny_model)
    text = "".join(traceback.format_exception(caught.value))
    assert "in fail" in text
    assert CANARY not in text


def test_the_bad_inputs_are_many_and_their_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60
    # Those whose texts a leak would show.
    assert sum(any(CANARY.encode() in data for data in files_of(case).values()) for case in CASES) >= 60
