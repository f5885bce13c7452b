"""Replay rows train beside the line's own: read, checked and walled off as these are, and never evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.train_qlora.data import read_rows
from components.validate_data.step import run
from qlora_retrain.config.data import DataConfig
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import json_lines
from qlora_retrain.core.errors import Exit
from qlora_retrain.core.outcome import StepResult
from tests.conftest import ticket_rows, write_jsonl

Row = dict[str, Any]
Gate = Callable[..., tuple[StepResult, Path]]
TICKETS: list[Any] = ticket_rows(300)
SUBJECTS = ("river", "planet", "engine", "forest", "island", "violin", "bridge", "castle", "desert", "market")


def general(number: int) -> Row:
    """A general chat; no two nearly equal each other."""
    subject = SUBJECTS[number % 10]
    question = f"Tell me about the {subject} {number * 7919 % 10007} that {SUBJECTS[number // 10 % 10]} people visit"
    return chat(question, f"It lies {number} miles away, and its {subject} keeper opens at {number % 12} o'clock.")


def chat(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def gate(tmp_path: Path, tiny_model: Path) -> Gate:
    """Run the data gate with replay rows over 300 tickets, which are labels."""

    def call(
        replay: list[Row], golden: list[Row] | None = None, reference: str | None = None, **settings: Any
    ) -> tuple[StepResult, Path]:
        folders: dict[str, Path | None] = {}
        for name, rows in (("raw_data", ticket_rows(300)), ("golden_data", golden), ("replay_data", replay)):
            folders[name] = tmp_path / name if rows is not None else None
            if rows is not None:
                (tmp_path / name).mkdir(exist_ok=True)
                write_jsonl(tmp_path / name / "rows.jsonl", rows)
        if reference is not None:
            (tmp_path / "reference").mkdir(exist_ok=True)
            (tmp_path / "reference/general.txt").write_text(reference)
        dataset = tmp_path / f"dataset-{len(list(tmp_path.iterdir()))}"
        dataset.mkdir()
        defaults = {"task": "labels", "split_seed": "line", "eval_fraction": 0.2, "min_eval_prompts": 10}
        result = run(
            DataConfig(**{**defaults, **settings}), base_model=tiny_model, reference_profile=None, eval_data=None,
            evaluation_history=None, dataset=dataset, **folders,
            reference_data=tmp_path / "reference" if reference is not None else None,
        )  # fmt: skip
        return result, dataset

    return call


def rows_of(dataset: Path, name: str) -> list[Row]:
    return [row for _, row in json_lines.read(dataset / name)]


def questions(dataset: Path, name: str) -> list[str]:
    return [turn["content"] for row in rows_of(dataset, name) for turn in row["messages"] if turn["role"] == "user"]


def profile_of(dataset: Path) -> dict[str, Any]:
    profile: dict[str, Any] = json.loads((dataset / "profile.json").read_text())
    return profile


def test_replay_rows_train_and_are_counted_apart(gate: Gate, tiny_model: Path) -> None:
    _, without = gate([general(0)], system="Answer with the intent.")
    result, dataset = gate([general(i) for i in range(40)], system="Answer with the intent.")
    assert (result.refused, result.numbers["rows_replay"]) == (None, 40)
    numbers = profile_of(dataset)["replay"]
    assert (numbers["read"], numbers["used"], numbers["reasons"]) == (40, 40, {})
    assert numbers["fraction"] == pytest.approx(40 / (40 + result.numbers["rows_train"]), abs=1e-5)
    assert "40 of 40 replay rows train" in (dataset / "report.html").read_text()

    # Nothing of the line's own data changes: rows, labels, drift.
    for name in ("train.jsonl", "eval.jsonl", "golden.jsonl", "dataset.json", "evaluated_prompts.txt"):
        assert (dataset / name).read_bytes() == (without / name).read_bytes(), name
    assert profile_of(dataset)["distributions"] == profile_of(without)["distributions"]
    assert json.loads((dataset / "dataset.json").read_text())["labels"] == ["delivery", "login", "refund"]

    # The line's system turn belongs to its task.
    assert {row["messages"][0]["role"] for row in rows_of(dataset, "replay.jsonl")} == {"user"}
    rows = read_rows(TrainConfig(), dataset, tiny_model)
    assert len(rows.train) == result.numbers["rows_train"] + 40
    assert len(rows.eval) == result.numbers["rows_eval"]


def test_no_more_than_the_fraction_trains_and_more_rows_change_few(gate: Gate) -> None:
    result, dataset = gate([general(i) for i in range(90)], replay_fraction=0.1)
    num_train = result.numbers["rows_train"]
    assert result.numbers["rows_replay"] == round(num_train / 9)
    assert profile_of(dataset)["replay"]["fraction"] == pytest.approx(0.1, abs=0.003)
    _, grown = gate([general(i) for i in range(99)], replay_fraction=0.1)
    assert len(set(questions(dataset, "replay.jsonl")) & set(questions(grown, "replay.jsonl"))) >= 20
    few, dataset = gate([general(i) for i in range(5)], replay_fraction=0.5)
    assert few.numbers["rows_replay"] == 5
    assert "asks for as many or more, and there are no more" in (dataset / "report.html").read_text()


def test_replay_rows_near_the_evaluation_do_not_train(gate: Gate) -> None:
    golden = [chat(f"Where can I see the golden {SUBJECTS[i]} number {i * 31} today", "login") for i in range(5)]
    _, dataset = gate([general(0)], golden)
    evaluated = questions(dataset, "eval.jsonl")
    replay = [
        chat(evaluated[0], "an answer"),
        chat(f"Hello, {evaluated[1]} thanks", "an answer"),
        chat(golden[0]["messages"][0]["content"].upper(), "an answer"),
        chat(f"{golden[1]['messages'][0]['content']} please", "an answer"),
        {"messages": [*chat(evaluated[2], "an answer")["messages"], *general(3)["messages"]]},
        *(general(i) for i in range(10, 20)),
    ]
    result, dataset = gate(replay, golden)
    reasons = profile_of(dataset)["replay"]["reasons"]
    assert reasons == {"in_eval_data": 2, "near_evaluation": 2, "in_golden_set": 1}
    assert result.numbers["rows_replay"] == 10
    assert not set(evaluated) & set(questions(dataset, "replay.jsonl"))
    listed = [row for row in rows_of(dataset, "quarantine.jsonl") if row["reason"] == "in_eval_data"]
    assert [row["row"] for row in listed] == [1, 5]


def test_replay_rows_go_through_the_checks_of_what_rows_say(gate: Gate) -> None:
    replay = [
        *(general(i) for i in range(10)),
        general(3),  # a repetition
        ticket_rows(300)[0],
        chat("what is the key", "it is AKIAIOSFODNN7EXAMPLE and " + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
        chat("whom do I write to", "write to anna@example.org for the catalogue of the museum"),
        {"messages": "no chat"},
    ]
    result, dataset = gate(replay, eval_fraction=0.01, min_eval_prompts=1)
    numbers = profile_of(dataset)["replay"]
    assert numbers["reasons"]["access_keys"] == 1
    assert numbers["reasons"]["exact_duplicate"] >= 1
    assert numbers["warnings"] == {"emails": 1}
    assert result.numbers["rows_replay"] == 11

    refused, _ = gate(replay, checks={"emails": "refuse"})
    assert refused.refused is not None
    assert "replay_data: rows.jsonl:14: " in str(refused.refused)
    assert "anna@example.org" not in str(refused.refused)


@pytest.mark.parametrize(
    ("passage", "is_shared"),
    [
        ("In the old town, the river flows past nine mills and seven bridges before it reaches the great sea.", True),
        ("in the OLD town the river flows past nine mills and -- seven bridges", True),
        ("The river flows past nine mills and seven bridges.", False),
    ],
)
def test_replay_rows_that_hold_reference_text_are_refused_by_their_numbers(
    gate: Gate, passage: str, is_shared: bool
) -> None:
    answer = "In the old town the river flows past nine mills and seven bridges before it ends."
    result, dataset = gate(
        [general(1), general(2), chat("What do you know?", answer)], reference=f"Other text.\n\n{passage}"
    )
    assert (result.refused is not None) == is_shared
    if result.refused is not None:
        assert result.refused.exit_code == Exit.DATA_REFUSED
        assert "1 rows share text with reference_data (rows.jsonl:3)" in str(result.refused)
        assert "river" not in str(result.refused)
        assert "share text with reference_data" in (dataset / "report.html").read_text()


def test_without_a_row_that_can_train_the_data_is_refused(gate: Gate) -> None:
    refused, _ = gate([{"messages": "no chat"}])
    assert "replay_data: none of its 1 rows is left to train on (bad_json: 1)" in str(refused.refused)


def test_the_fields_that_a_line_names_are_those_of_its_own_files(tmp_path: Path, tiny_model: Path) -> None:
    own = [{"question": row["messages"][0]["content"], "intent": row["messages"][1]["content"]} for row in TICKETS]
    for name, rows in (("raw", own), ("replay", [general(i) for i in range(5)])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "rows.jsonl", rows)
    (tmp_path / "dataset").mkdir()
    settings = DataConfig(
        prompt_field="question", response_field="intent", task="labels", split_seed="line", min_eval_prompts=10
    )
    result = run(
        settings, tmp_path / "raw", tiny_model, None, None, None, None, tmp_path / "dataset",
        replay_data=tmp_path / "replay",
    )  # fmt: skip
    assert (result.refused, result.numbers["rows_replay"]) == (None, 5)


def test_a_line_of_texts_has_replay_texts_in_the_same_field(tmp_path: Path, tiny_model: Path) -> None:
    texts = [{"text": f"{row['messages'][0]['content']} => {row['messages'][1]['content']}"} for row in TICKETS]
    for name, rows in (("raw", texts), ("replay", [{"text": f"The {s} is old => yes"} for s in SUBJECTS])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "rows.jsonl", rows)
    (tmp_path / "dataset").mkdir()
    settings = DataConfig(text_field="text", answer_after="=>", split_seed="line", min_eval_prompts=10)
    result = run(
        settings, tmp_path / "raw", tiny_model, None, None, None, None, tmp_path / "dataset",
        replay_data=tmp_path / "replay",
    )  # fmt: skip
    assert (result.refused, result.numbers["rows_replay"]) == (None, 10)
