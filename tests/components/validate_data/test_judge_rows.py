"""A lab judges by training rows: neither by what it trains on, nor by what the line itself evaluates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.validate_data.checks import Row
from components.validate_data.evaluated_before import _digest_lines
from components.validate_data.gate_rows import GateRows, read_gate_rows
from components.validate_data.judge_rows import judge_by_training_rows
from components.validate_data.splitting import assign_splits, find_openings
from components.validate_data.step import run as validate_data
from qlora_retrain.config.data import DataConfig
from qlora_retrain.lm import chat
from tests.conftest import ticket_rows, write_jsonl

LINE = DataConfig(split_seed="line", eval_fraction=0.2)
LAB = LINE.model_copy(update={"judge_fraction": 0.25})


def row(*texts: str, group: str | None = None) -> Row:
    turns: list[dict[str, Any]] = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return Row("a.jsonl", 1, turns, "0" * 12, group=group)


def split(rows: list[Row], config: DataConfig) -> list[str | None]:
    for item in rows:
        item.split = item.reason = None
    assign_splits(rows, config, find_openings(rows, config))
    judge_by_training_rows(rows, [], config)
    return [item.split for item in rows]


def user_texts(item: Row) -> tuple[str, ...]:
    return tuple(turn["content"] for turn in item.messages if turn["role"] == "user")


# Few words, so that many chats begin alike; a greeting in front of some.
TURN = st.sampled_from(["hello", "refund", "parcel", "login", "price", "thanks"])
CHATS = st.lists(st.lists(TURN, min_size=1, max_size=3).map(tuple), min_size=30, max_size=120)


@settings(max_examples=60, deadline=None)
@given(CHATS, st.sampled_from([0.05, 0.25, 0.5]))
def test_no_chat_that_judges_is_trained_on_nor_is_the_lines_own_evaluation(
    chats: list[tuple[str, ...]], judge_fraction: float
) -> None:
    rows = [row(*[text for user in texts for text in (user, f"answer {i}")]) for i, texts in enumerate(chats)]
    before = split(rows, LINE)
    after = split(rows, LINE.model_copy(update={"judge_fraction": judge_fraction}))

    for old, new in zip(before, after, strict=True):
        # What the line evaluates is on neither side, and nothing but its training rows is on either.
        assert new not in ("train", "eval") or old == "train"
        assert old != "eval" or new == "dropped"
    judged = [item for item in rows if item.split == "eval"]
    trained = [item for item in rows if item.split == "train"]
    assert not {item.prompt_id for item in judged} & {item.prompt_id for item in trained}
    # Where no beginning is shared by many chats, no chat goes on from one of the other side.
    if not find_openings(rows, LINE):
        texts = {user_texts(item) for item in judged}
        for item in trained:
            own = user_texts(item)
            assert not any(
                own == judged_text[: len(own)] or judged_text == own[: len(judged_text)] for judged_text in texts
            )


def test_the_share_is_one_of_the_training_prompts_and_a_group_stays_together() -> None:
    rows = [row(f"question {i}", "answer", group=f"user {i // 2}") for i in range(4000)]
    before, after = split(rows, LINE), split(rows, LAB)
    num_train = before.count("train")
    assert after.count("eval") / num_train == pytest.approx(0.25, abs=0.04)
    assert after.count("eval") + after.count("train") == num_train
    by_group = {item.group: item.split for item in rows}
    assert all(by_group[item.group] == item.split for item in rows)


def test_a_larger_evaluation_of_the_line_takes_nothing_that_a_lab_judged_by() -> None:
    rows = [row(f"question {i}", "answer") for i in range(2000)]
    judged = {i for i, side in enumerate(split(rows, LAB)) if side == "eval"}
    grown = split(rows, LINE.model_copy(update={"eval_fraction": 0.5}))
    assert not judged & {i for i, side in enumerate(grown) if side == "eval"}


@pytest.fixture
def read(tmp_path: Path, tiny_model: Path) -> Callable[..., GateRows]:
    tokenizer = chat.load_tokenizer(tiny_model)

    def call(config: DataConfig, history: frozenset[str] = frozenset(), **sources: list[Any]) -> GateRows:
        for name, rows in sources.items():
            (tmp_path / name).mkdir(exist_ok=True)
            write_jsonl(tmp_path / name / "a.jsonl", rows)
        paths = {n: tmp_path / n if n in sources else None for n in ("raw_data", "golden_data", "eval_data")}
        return read_gate_rows(config, tokenizer, history=history, **paths)  # type: ignore[arg-type]

    return call


def test_golden_rows_and_an_evaluation_file_are_reserved_and_not_scored(read: Callable[..., GateRows]) -> None:
    rows = ticket_rows(200)
    sources = {"raw_data": rows[:150], "golden_data": rows[150:160], "eval_data": rows[160:]}
    result = read(LAB, **sources)
    sides = result.by_split()
    assert sides["golden"] == []
    reserved = {json.dumps(item["messages"]) for item in rows[150:]}
    scored = {json.dumps([*item.messages]) for side in sides.values() for item in side}
    assert not scored & reserved
    assert len(sides["eval"]) == pytest.approx(150 * 0.25, abs=16)
    assert len(sides["train"]) + len(sides["eval"]) == 150


def test_a_near_copy_of_a_row_that_judges_is_not_trained_on(read: Callable[..., GateRows]) -> None:
    rows: list[Any] = []
    for i in range(120):
        text = f"please tell me where the parcel of order {i} with the blue shirt and the {i} socks is today"
        for ending in ("", " thanks"):
            turns = [{"role": "user", "content": text + ending}, {"role": "assistant", "content": f"number {i}"}]
            rows.append({"messages": turns})
    result = read(LAB.model_copy(update={"near_evaluation_threshold": 0.95}), raw_data=rows)
    sides = result.by_split()
    judged = {item.messages[0]["content"].removesuffix(" thanks") for item in sides["eval"]}
    trained = {item.messages[0]["content"].removesuffix(" thanks") for item in sides["train"]}
    assert judged
    assert trained
    assert any(item.reason == "near_evaluation" for item in result.rows)
    assert not judged & trained


def test_what_the_line_evaluated_before_does_not_judge(read: Callable[..., GateRows]) -> None:
    rows = ticket_rows(150)
    judged = read(LAB, raw_data=rows).by_split()["eval"]
    history = frozenset(line for item in judged[:5] for line in _digest_lines(item, LAB))
    again = read(LAB, history, raw_data=rows).by_split()
    ids = {side: {json.dumps(item.messages) for item in again[side]} for side in ("train", "eval")}
    assert not {json.dumps(item.messages) for item in judged[:5]} & (ids["train"] | ids["eval"])
    assert ids["eval"] == {json.dumps(item.messages) for item in judged[5:]}


def test_too_few_prompts_to_judge_by_are_refused_with_what_to_set(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "dataset").mkdir()
    write_jsonl(tmp_path / "raw" / "a.jsonl", ticket_rows(60))
    config = LAB.model_copy(update={"judge_fraction": 0.05, "min_train_rows": 10})
    result = validate_data(config, tmp_path / "raw", tiny_model, None, None, None, None, tmp_path / "dataset")
    assert result.refused is not None
    assert "different prompts to judge by" in str(result.refused)
    assert "--judge-fraction" in str(result.refused)
