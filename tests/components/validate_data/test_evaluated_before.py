"""A prompt that was ever evaluated is never trained on later, whatever else of the line has changed."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.validate_data.checks import Row
from components.validate_data.evaluated_before import History, keep_out_evaluated, read_history, write_evaluated
from components.validate_data.similar_rows import check_similar_rows
from components.validate_data.splitting import assign_splits, find_openings
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import graph

Turns = Sequence[str]  # a user turn, its answer, and so on
LATER = DataConfig(split_seed="later", eval_fraction=1e-9)  # nearly all is training


def chat(*texts: str, system: str | None = None, group: str | None = None, is_greeted: bool = False) -> Row:
    turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    roles = ("assistant", "user") if is_greeted else ("user", "assistant")
    turns += [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Row("a.jsonl", 1, turns, "0" * 12, group=group)


def remember(folder: Path, rows: Sequence[Row], config: DataConfig = LATER) -> History:
    write_evaluated(folder, rows, config)
    return read_history(folder)


def split(rows: list[Row], config: DataConfig, history: History = frozenset()) -> tuple[str, ...]:
    openings = find_openings(rows, config)
    assign_splits(rows, config, openings)
    keep_out_evaluated(rows, history, config, openings)
    return openings


def supervised_prompts(row: Row) -> list[tuple[str, ...]]:
    """What comes before each assistant turn, in canonical text: computed without the code under test."""
    texts = [" ".join(unicodedata.normalize("NFKC", t["content"]).casefold().split()) for t in row.messages]
    turns = [f"{t['role']}:{text}" for t, text in zip(row.messages, texts, strict=True) if t["role"] != "system"]
    return [tuple(turns[:i]) for i, turn in enumerate(turns) if turn.startswith("assistant:")]


words = st.sampled_from("abcd")
chats = st.lists(st.lists(words, min_size=2, max_size=8).filter(lambda t: len(t) % 2 == 0), max_size=30)
splits = st.builds(
    DataConfig,
    split_seed=st.sampled_from(["one", "two"]),
    eval_fraction=st.sampled_from([1e-9, 0.2, 0.5]),
    max_eval_rows=st.sampled_from([1, 1000]),
)


@settings(deadline=None, max_examples=80)
@given(runs=st.lists(st.tuples(chats, splits), min_size=2, max_size=4))
def test_no_later_run_learns_a_prompt_that_an_earlier_one_has_evaluated(
    runs: list[tuple[list[Turns], DataConfig]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("history")
    history, evaluated = frozenset[str](), set[tuple[str, ...]]()
    for texts, config in runs:
        rows = [chat(*turns) for turns in texts]
        split(rows, config, history)
        training = [row for row in rows if row.split == "train"]
        learnt = {prompt for row in training for prompt in supervised_prompts(row)}
        assert not evaluated & learnt
        # What a row is asked for, and not its earlier answers.
        evaluation = [row for row in rows if row.split == "eval"]
        evaluated |= {supervised_prompts(row)[-1] for row in evaluation}
        history |= remember(folder, evaluation, config)


@pytest.mark.parametrize(
    ("evaluated", "trained", "is_kept_out"),
    [
        (chat("How do I pay?", "x"), chat("how  do I\u00a0PAY", "y"), True),
        (chat("How do I pay?", "x"), chat("How do I pay?", "y", system="Be brief."), True),
        (chat("How do I pay?", "x"), chat("How do I pay you?", "x"), False),
        (chat("a", "x", "b", "y"), chat("a", "x"), True),  # its beginning
        (chat("a", "x"), chat("a", "x", "b", "y"), True),  # what goes on from it
        (chat("a", "x", "b", "y"), chat("b", "y"), False),
        (chat("q", "x", group="G 1"), chat("another", "x", group="g 1"), True),
        (chat("q", "x", group="1"), chat("another", "x", group="2"), False),
        (chat("q", "x", group="1"), chat("q", "x", group="2"), True),
        (chat("q", "x", group="1"), chat("q", "x"), True),
        # A greeting joins no chats, but it must not be learnt where it was a whole chat, nor where it began one.
        (chat("Hello!", "a", "x", is_greeted=True), chat("Hello!", "b", "y", is_greeted=True), False),
        (chat("Hello!", is_greeted=True), chat("Hello!", "b", "y", is_greeted=True), True),
        (chat("Hello!", "a", "x", is_greeted=True), chat("Hello!", is_greeted=True), True),
    ],
)
def test_what_is_the_same_prompt_is_kept_out(tmp_path: Path, evaluated: Row, trained: Row, is_kept_out: bool) -> None:
    config = LATER.model_copy(update={"group_field": "customer"})
    split([trained], config, remember(tmp_path, [evaluated], config))
    assert (trained.reason, trained.split) == (("evaluated_before", None) if is_kept_out else (None, "train"))


def test_a_group_of_another_field_is_another_one(tmp_path: Path) -> None:
    history = remember(tmp_path, [chat("q", "x", group="12")], LATER.model_copy(update={"group_field": "customer"}))
    row = chat("another", "x", group="12")
    split([row], LATER.model_copy(update={"group_field": "document"}), history)
    assert row.split == "train"


def test_a_prompt_that_was_evaluated_may_be_evaluated_again(tmp_path: Path) -> None:
    config = DataConfig(split_seed="line", eval_fraction=0.5)
    rows = [chat(f"question {i}", "x") for i in range(40)]
    split(rows, config)
    history = remember(tmp_path, [row for row in rows if row.split == "eval"], config)
    sides = [row.split for row in rows]
    split(rows, config, history)
    assert [row.split for row in rows] == sides
    assert {"train", "eval"} == set(sides)


def test_a_shared_opening_keeps_out_its_own_chats_alone(tmp_path: Path) -> None:
    # In few chats the opening was the prompt; in many it joins no chats any more.
    few = [chat("Hello", "Hi.", f"question {i}", "x") for i in range(4)]
    assert find_openings(few, LATER) == ()
    history = remember(tmp_path, few[:2])
    many = [chat("Hello", "Hi.", f"question {i}", "x") for i in range(40)]
    assert len(split(many, LATER, history)) == 2
    assert [row.split for row in many[:4]] == [None, None, "train", "train"]

    # A chat that was no more than the opening is learnt by all that go on from it.
    history = remember(tmp_path, [chat("Hello", "Hi.")])
    split(many, LATER, history)
    assert {row.reason for row in many if row is not many[0] and row is not many[1]} == {"evaluated_before"}


def test_the_file_holds_sorted_digests_and_no_text_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [chat(f"secret {i}", "answer", "more", "x", group="user") for i in range(5)]
    config = LATER.model_copy(update={"group_field": "customer"})
    remember(tmp_path, rows, config)
    data = (tmp_path / graph.EVALUATED_PROMPTS).read_bytes()
    # Of each row its beginnings (question, system turn, question), itself, and its group.
    assert [line.partition(" ")[0] for line in data.decode().splitlines()].count("beginning") == 15
    assert (data.count(b"chat "), data.count(b"group "), data.count(b"\n")) == (5, 1, 21)
    assert b"secret" not in data
    assert data.splitlines() == sorted(data.splitlines())
    remember(tmp_path, rows[::-1] + rows, config.model_copy(update={"split_seed": "another"}))
    assert (tmp_path / graph.EVALUATED_PROMPTS).read_bytes() == data


def test_a_near_copy_of_a_prompt_that_was_evaluated_before_is_kept_out_too(tmp_path: Path) -> None:
    text = "how long does it take until the money for my order is back on my account"
    evaluated, copy, further = (chat(t, "x") for t in (text, f"{text} now", "where can I change my password"))
    rows = [evaluated, copy, further]
    split(rows, LATER, remember(tmp_path, [chat(text, "y")]))
    check_similar_rows(rows, [], LATER)
    assert [row.reason for row in rows] == ["evaluated_before", "near_evaluation", None]
