"""A conversation is on one side of the split, whatever is added to the data; reserved conversations are on neither."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.validate_data.checks import Row
from components.validate_data.splitting import (
    as_fraction,
    assign_splits,
    digest_beginnings,
    find_openings,
    keep_apart,
    reserve_evaluation,
)
from qlora_retrain.config.data import DataConfig

TEXT = DataConfig(split_seed="line", eval_fraction=0.3)
Turns = Sequence[str]  # a user turn, its answer, and so on


def chat(*texts: str, system: str | None = None) -> Row:
    turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    turns += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Row("a.jsonl", 1, turns, "0" * 12)


def row(prompt: str, answer: str = "refund", system: str | None = None) -> Row:
    return chat(prompt, answer, system=system)


def sides(rows: list[Row], config: DataConfig = TEXT) -> list[str | None]:
    for item in rows:
        item.split = item.reason = None
    openings = find_openings(rows, config)
    assign_splits(rows, config, openings)
    return [item.split for item in rows]


def supervised_prompts(item: Row) -> set[tuple[str, ...]]:
    """What comes before each assistant turn, in canonical text: the walls, computed without the code under test."""
    texts = [" ".join(unicodedata.normalize("NFKC", t["content"]).casefold().split()) for t in item.messages]
    roles = [t["role"] for t in item.messages]
    turns = [f"{role}:{text}" for role, text in zip(roles, texts, strict=True) if role != "system"]
    return {tuple(turns[:i]) for i, turn in enumerate(turns) if turn.startswith("assistant:")}


def assert_walls(rows: list[Row], reserved: Sequence[Row] = ()) -> None:
    """No evaluation conversation is a beginning or a continuation of a training one."""
    training = [r for r in rows if r.split == "train"]
    evaluation = [*(r for r in rows if r.split in ("eval", "dropped")), *reserved]
    learnt = set().union(*map(supervised_prompts, training)) if training else set()
    for item in evaluation:
        assert max(supervised_prompts(item), key=len) not in learnt, item.messages
    scored = set().union(*map(supervised_prompts, evaluation)) if evaluation else set()
    for item in training:
        assert max(supervised_prompts(item), key=len) not in scored, item.messages


def test_the_fraction_is_the_first_64_bits_of_a_hash_of_seed_and_first_user_turn() -> None:
    bits = "".join(f"{byte:08b}" for byte in hashlib.sha256(b"line\nuser: where is it").digest())
    expected = sum(int(bit) / 2 ** (i + 1) for i, bit in enumerate(bits[:64]))
    beginnings = digest_beginnings(chat("WHERE  is it?", "Here.", "And now?", "There.", system="Be brief."), "line")
    assert abs(as_fraction(beginnings[0]) - expected) < 1e-12
    whole = hashlib.sha256(b"line\nuser: where is it\nsystem: be brief\nuser: and now").hexdigest()
    assert beginnings[-1] == whole[:16]


def test_about_the_configured_fraction_is_evaluation_and_each_side_is_a_function_of_the_first_turn() -> None:
    rows = [row(f"prompt {i}") for i in range(4000)]
    row_sides = sides(rows)
    assert abs(row_sides.count("eval") / 4000 - 0.3) < 0.03  # four standard deviations
    assert [as_fraction(digest_beginnings(r, "line")[0]) < 0.3 for r in rows] == [side == "eval" for side in row_sides]


def test_the_system_turn_case_and_spacing_do_not_move_a_row() -> None:
    for i in range(50):
        assert len(set(sides([row(f"Prompt {i}", "a"), row(f"prompt   {i}", "b", system="Be brief.")]))) == 1


def test_a_chat_and_its_continuations_are_on_one_side() -> None:
    rows = []
    for i in range(60):
        turns = [f"question {i}", "a", f"further {i}", "b", f"last {i}", "c"]
        rows += [chat(*turns[:length]) for length in (2, 4, 6)]
        # A branch, and the same chat typed in another way.
        rows += [chat(f"question {i}", "a", "or this?", "d"), chat(f"QUESTION  {i}", "e", "f", "g")]
    row_sides = sides(rows)
    assert all(len(set(row_sides[i : i + 5])) == 1 for i in range(0, len(rows), 5))
    assert 0 < row_sides.count("eval") < len(rows)
    assert_walls(rows)


@pytest.mark.parametrize("opening", [("Hello", "Hi, how can I help?"), ("Translate what I write next.", "OK.")])
def test_one_opening_of_all_chats_does_not_put_them_all_on_one_side(opening: Turns) -> None:
    rows = [chat(*opening, f"question {i}", "answer") for i in range(200)]
    rows += [chat(*opening, f"question {i}", "answer", "and then?", "more") for i in range(200)]
    row_sides = sides(rows)
    assert abs(row_sides.count("eval") / 400 - 0.3) < 0.14  # four standard deviations of 200 conversations
    assert row_sides[:200] == row_sides[200:]
    assert_walls(rows)


def test_texts_in_the_system_turn_under_one_question_are_told_apart() -> None:
    rows = [row("Summarize the text.", f"summary {i}", system=f"Text {i} ...") for i in range(200)]
    assert 30 < sides(rows).count("eval") < 90


def test_a_frequent_greeting_is_an_opening_and_the_other_chats_keep_their_sides() -> None:
    others = [row(f"prompt {i}") for i in range(150)]
    greetings = [chat("Hello!", "Hi.", f"question {i}", "answer") for i in range(100)]
    alone = sides(others)
    row_sides = sides(others + greetings)
    assert row_sides[:150] == alone
    assert set(row_sides[150:]) == {"train", "eval"}


def test_a_long_conversation_and_one_with_a_few_branches_are_no_opening() -> None:
    turns = [f"turn {i}" for i in range(80)]
    rows = [chat(*turns[:length]) for length in range(2, 81, 2)]
    rows += [chat("Plan a trip", "Where to?", f"city {i}", "ok") for i in range(10)]
    assert find_openings(rows, TEXT) == ()
    row_sides = sides(rows)
    assert (len(set(row_sides[:40])), len(set(row_sides[40:]))) == (1, 1)


def test_a_conversation_of_most_rows_is_told_apart_where_it_branches() -> None:
    rows = [row("Summarize the text.", f"summary {i}", system=f"Text {i % 5} ...") for i in range(150)]
    row_sides = sides(rows)
    assert [len(set(row_sides[i::5])) for i in range(5)] == [1] * 5
    assert find_openings(rows[:10], TEXT) == ()
    # One prompt for all has nothing to be told apart by.
    assert find_openings([row("Tell a joke.", f"joke {i}") for i in range(150)], TEXT) == ()


def test_a_chat_that_is_itself_an_opening_is_on_neither_side_where_both_go_on_from_it() -> None:
    rows = [chat("Hello", "Hi.", f"question {i}", "answer") for i in range(60)]
    rows += [chat("Hello", "Hi."), chat("hello", "Good day."), row("Bye")]
    row_sides = sides(rows)
    assert [r.reason for r in rows[60:]] == ["shared_opening", "shared_opening", None]
    assert row_sides[60:62] == [None, None]
    assert_walls(rows)


def test_openings_of_the_earlier_version_count_whatever_the_data_now_holds() -> None:
    rows = [chat("Hello", "Hi.", f"question {i}", "answer") for i in range(60)]
    openings = find_openings(rows, TEXT)
    assert openings == tuple(sorted(digest_beginnings(rows[0], "line")[:2]))
    # With few of these chats left they are still split by their further turns.
    inherited = TEXT.model_copy(update={"shared_openings": openings})
    assert find_openings(rows[:3], inherited) == openings
    assert find_openings(rows, TEXT.model_copy(update={"shared_openings": ()})) == ()


words = st.sampled_from("abcd")
chats = st.lists(st.lists(words, min_size=2, max_size=8).filter(lambda t: len(t) % 2 == 0), max_size=30)


@settings(deadline=None, max_examples=60)
@given(chats, chats)
def test_a_row_never_crosses_the_split_as_data_grows_and_the_walls_stand(old: list[Turns], new: list[Turns]) -> None:
    few = TEXT.model_copy(update={"max_eval_rows": 3, "eval_fraction": 0.5})
    before, after = [chat(*turns) for turns in old], [chat(*turns) for turns in (*new, *old)]
    # The line's later data: it inherits the openings.
    openings = find_openings(before, few)
    was, now = sides(before, few), sides(after, few.model_copy(update={"shared_openings": openings}))[len(new) :]
    for old_side, new_side in zip(was, now, strict=True):
        assert (old_side == "train") == (new_side == "train") or new_side is None or old_side is None
    assert_walls(before)
    assert_walls(after)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(words, min_size=1, max_size=3), min_size=12, max_size=40), st.data())
def test_the_walls_stand_under_a_shared_opening(ends: list[list[str]], data: st.DataObject) -> None:
    rows = [chat("hello", "hi", *(t for i, w in enumerate(e) for t in (f"{w}{data.draw(st.integers(0, 9))}", "x")))
            for e in ends]  # fmt: skip
    rows += [chat("hello", "hi"), row("other")]
    sides(rows, TEXT.model_copy(update={"eval_fraction": 0.5}))
    assert_walls(rows)
    reserved = data.draw(st.sampled_from(rows))
    rest_rows = [chat(*(t["content"] for t in r.messages)) for r in rows]
    openings = find_openings(rest_rows, TEXT)
    keep_apart(rest_rows, [reserved], "in_golden_set", TEXT, openings)
    assign_splits(rest_rows, TEXT.model_copy(update={"eval_fraction": 1e-9}), openings)
    assert_walls(rest_rows, [reserved])


def test_a_line_that_grows_trains_on_no_row_that_was_evaluation_though_it_now_needs_fewer() -> None:
    auto = DataConfig(split_seed="line")
    small = [row(f"prompt {i}") for i in range(100)]
    before = assign_splits(small, auto)
    assert before > 0.2

    # The plan hands the fraction on; without it, the same rows would cross.
    for inherited, crosses in ((before, False), (None, True)):
        grown = [row(f"prompt {i}") for i in range(1000)]
        after = assign_splits(grown, auto.model_copy(update={"min_eval_fraction": inherited}))
        assert after == (0.1 if crosses else before)
        pairs = [(old.split, new.split) for old, new in zip(small, grown, strict=False)]
        assert (("eval", "train") in pairs) == crosses
        assert ("train", "eval") not in pairs


def test_reserved_conversations_leave_with_their_beginnings_and_continuations_whatever_their_answer() -> None:
    golden = [chat("a", "x", "b", "y"), row("q", system="Be brief.")]
    rows = [
        row("A", "z"),
        chat("a", "x", "b", "y", "c", "w"),
        chat("a", "x", "other", "v"),
        row("Q"),
        row("b"),
        row("c"),
    ]
    keep_apart(rows, golden, "in_golden_set", TEXT, ())
    assert [item.reason for item in rows] == ["in_golden_set"] * 4 + [None, None]


def test_a_reserved_chat_under_a_shared_opening_takes_its_own_conversation_alone() -> None:
    rows = [chat("Hello", "Hi.", f"question {i}", "answer", "more?", "no") for i in range(60)] + [chat("Hello", "Hi.")]
    openings = find_openings(rows, TEXT)
    keep_apart(rows, [chat("hello", "Hi.", "Question 7", "other")], "in_golden_set", TEXT, openings)
    # The opening itself is a beginning of the reserved chat, so it leaves too.
    assert [i for i, item in enumerate(rows) if item.reason] == [7, 60]

    # A reserved chat that is the opening is a beginning of them all.
    keep_apart(rows, [chat("HELLO", "Hm.")], "in_golden_set", TEXT, openings)
    assert all(item.reason for item in rows)


def test_too_many_evaluation_rows_keep_the_smallest_hashes_and_never_go_to_train() -> None:
    rows = [row(f"prompt {i}") for i in range(200)]
    everything = sides(rows)
    limited = sides(rows, TEXT.model_copy(update={"max_eval_rows": 10}))

    assert [side == "train" for side in limited] == [side == "train" for side in everything]
    assert limited.count("eval") == 10
    places = {
        side: [as_fraction(digest_beginnings(r, "line")[0]) for r in rows if r.split == side]
        for side in ("eval", "dropped")
    }
    assert max(places["eval"]) < min(places["dropped"])


def test_the_rows_of_an_evaluation_file_are_all_evaluation_up_to_the_limit() -> None:
    rows = [row(f"prompt {i}") for i in range(20)]
    rows[3].reason = "exact_duplicate"
    reserve_evaluation(rows, TEXT.model_copy(update={"max_eval_rows": 15}))
    assert [r.split for r in rows].count("eval") == 15
    assert [r.split for r in rows].count("dropped") == 4
    assert rows[3].split is None


def test_a_system_turn_within_a_chat_does_not_part_it_from_its_beginning() -> None:
    # The opening makes the system turns decide, and those of the continuation are two.
    rows = [chat("hello", "hi", f"question {i}", "answer", system="Be brief.") for i in range(60)]
    for i in range(60):
        longer = chat("hello", "hi", f"question {i}", "answer", "more?", "no", system="Be brief.")
        longer.messages.insert(5, {"role": "system", "content": "Now be polite."})
        rows.append(longer)
    row_sides = sides(rows)
    assert row_sides[:60] == row_sides[60:]
    assert set(row_sides) == {"train", "eval"}


def test_an_opening_that_nothing_goes_on_from_any_more_stays_with_its_own_beginning() -> None:
    beginning, longer = chat("hello", "hi"), chat("hello", "hi", "and now?", "no")
    for seed in map(str, range(30)):
        paths = [digest_beginnings(item, seed) for item in (beginning, longer)]
        config = TEXT.model_copy(update={"split_seed": seed, "shared_openings": paths[1]})
        row_sides = sides([beginning, longer], config)
        assert row_sides[0] == row_sides[1] is not None


@pytest.mark.parametrize("system", [None, "You are a pirate."])
def test_a_greeting_is_not_evaluated_where_chats_that_begin_with_it_are_trained_on(system: str | None) -> None:
    def greeted(*texts: str) -> Row:
        item = chat(*texts, system=system)
        item.messages.insert(len(item.messages) - len(texts), {"role": "assistant", "content": "Ahoy!"})
        return item

    rows = [greeted(f"question {i}", "answer") for i in range(60)]
    row_sides = sides([*rows, greeted()])
    assert set(row_sides[:60]) == {"train", "eval"}
    assert row_sides[60] is None
    # The greeting does not move a chat that has it.
    assert row_sides[:60] == sides([row(f"question {i}") for i in range(60)])
    assert sides([greeted()]) != [None]

    for reserved, others in ((greeted(), rows), (rows[0], [greeted()])):
        keep_apart(others, [reserved], "in_golden_set", TEXT, ())
        assert {item.reason for item in others} == {"in_golden_set"}


def test_rows_of_one_group_are_on_one_side_and_are_one_prompt() -> None:
    rows = [row(f"question {i} about {i % 40}") for i in range(400)]
    for i, example in enumerate(rows):
        example.group = f"Document {i % 40}"
    row_sides = sides(rows)
    by_group = {i: {row_sides[k] for k in range(i, 400, 40)} for i in range(40)}
    assert all(len(group_sides) == 1 for group_sides in by_group.values())
    assert {side for group_sides in by_group.values() for side in group_sides} == {"train", "eval"}
    assert len({example.prompt_id for example in rows}) == 40
