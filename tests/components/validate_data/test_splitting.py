"""The split depends on the prompt alone; repeats, contradictions and golden rows are kept out of it."""

from __future__ import annotations

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from components.validate_data.checks import Row
from components.validate_data.splitting import assign_splits, hash_fraction, prompt_text, quarantine_repeats
from qlora_retrain.config.sections import DataConfig

TEXT = DataConfig(split_seed="line", eval_fraction=0.3)
LABELS = DataConfig(split_seed="line", eval_fraction=0.3, task="labels")


def row(prompt: str, answer: str = "refund", number: int = 1, system: str | None = None) -> Row:
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Row("a.jsonl", number, turns, "0" * 12)


def sides(rows: list[Row], config: DataConfig = TEXT) -> list[str | None]:
    quarantine_repeats(rows, config, ())
    assign_splits(rows, config)
    return [item.split for item in rows]


def test_the_fraction_is_the_first_64_bits_of_a_hash_of_seed_and_prompt() -> None:
    bits = "".join(f"{byte:08b}" for byte in hashlib.sha256(b"line\nuser: where is it?").digest())
    expected = sum(int(bit) / 2 ** (i + 1) for i, bit in enumerate(bits[:64]))
    assert abs(hash_fraction("line", prompt_text(row("WHERE  is it?"))) - expected) < 1e-12
    assert hash_fraction(None, "x") == hash_fraction("", "x") != hash_fraction("line", "x")


@settings(deadline=None)
@given(st.lists(st.text("abcdef ", min_size=1).filter(str.strip), unique=True), st.lists(st.text("abc", min_size=1)))
def test_a_row_never_crosses_the_split_as_data_grows(old: list[str], new: list[str]) -> None:
    few = TEXT.model_copy(update={"max_eval_rows": 3})
    before, after = [row(p) for p in old], [row(p, "login") for p in new] + [row(p) for p in old]
    was, now = sides(before, few), sides(after, few)[len(new) :]
    for old_side, new_side in zip(was, now, strict=True):
        assert (old_side == "train") == (new_side == "train") or new_side is None or old_side is None


def test_about_the_configured_fraction_is_evaluation_and_each_side_is_a_function_of_the_prompt() -> None:
    rows = [row(f"prompt {i}") for i in range(4000)]
    row_sides = sides(rows)
    assert abs(row_sides.count("eval") / 4000 - 0.3) < 0.03  # four standard deviations
    assert [hash_fraction("line", prompt_text(item)) < 0.3 for item in rows] == [side == "eval" for side in row_sides]


def test_the_system_turn_case_and_spacing_do_not_move_a_row() -> None:
    for i in range(50):
        assert len(set(sides([row(f"Prompt {i}", "a"), row(f"prompt   {i}", "b", system="Be brief.")]))) == 1


def test_an_exact_duplicate_is_kept_once_the_first() -> None:
    rows = [row("a", number=1), row("b", number=2), row("A ", " refund\n", number=3)]
    quarantine_repeats(rows, TEXT, ())
    assert [item.reason for item in rows] == [None, None, "exact_duplicate"]


def test_labels_that_contradict_each_other_all_leave_and_texts_stay_on_one_side() -> None:
    def rows() -> list[Row]:
        return [row("a", "refund"), row("a", "refund"), row("A", "login"), row("b", "login")]

    labels, texts = rows(), rows()
    sides(labels, LABELS)
    reasons = ["conflicting_answer", "exact_duplicate", "conflicting_answer", None]
    assert [item.reason for item in labels] == reasons
    row_sides = sides(texts, TEXT)
    assert [item.reason for item in texts] == [None, "exact_duplicate", None, None]
    assert row_sides[0] == row_sides[2] is not None


def test_golden_prompts_leave_whatever_their_answer() -> None:
    rows = [row("a", "x"), row("A", "y"), row("b")]
    quarantine_repeats(rows, LABELS, {prompt_text(row("a"))})
    assert [item.reason for item in rows] == ["in_golden_set", "in_golden_set", None]


def test_too_many_evaluation_rows_keep_the_smallest_hashes_and_never_go_to_train() -> None:
    rows = [row(f"prompt {i}") for i in range(200)]
    everything = sides(rows)
    limited = sides(rows, TEXT.model_copy(update={"max_eval_rows": 10}))

    assert [side == "train" for side in limited] == [side == "train" for side in everything]
    assert limited.count("eval") == 10
    places = {
        side: [hash_fraction("line", prompt_text(r)) for r in rows if r.split == side] for side in ("eval", "dropped")
    }
    assert max(places["eval"]) < min(places["dropped"])
