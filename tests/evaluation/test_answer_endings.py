"""Which rows show whether answers end, how many tokens they may take, and what the rule makes of the share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import answer_endings
from qlora_retrain.evaluation.rows import Row, RowScore
from qlora_retrain.evaluation.rules.ending_rule import answers_end
from qlora_retrain.lm import chat, generation
from qlora_retrain.lm.generation import Completion

LABELS = ["delivery", "login", "refund"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return chat.load_tokenizer(tiny_model)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record what would be generated; every second answer ends."""
    calls: dict[str, Any] = {}

    def generate_answers(
        model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, *_: Any, **__: Any
    ) -> list[Completion]:
        calls.update(prompts=list(prompts), max_new_tokens=max_new_tokens)
        return [Completion((2,), "", "", ended=i % 2 == 0) for i in range(len(prompts))]

    monkeypatch.setattr(generation, "generate_answers", generate_answers)
    return calls


def rows(count: int, answer: str = "refund", suite: str = "eval") -> list[Row]:
    return [
        Row(f"{i:016x}", suite, [{"role": "user", "content": f"order {i}"}, {"role": "assistant", "content": answer}])
        for i in range(count)
    ]


def test_the_sample_is_chosen_by_hash_among_evaluation_rows_whose_answer_fits(
    tokenizer: Any, generated: dict[str, Any]
) -> None:
    short, long = rows(40), [Row(f"long-{r.id}", "eval", r.messages) for r in rows(40, "refund " * 20)]
    golden = rows(5, suite="golden")
    settings = EvaluateConfig(stop_rows=12, max_new_tokens=10)
    ended = answer_endings.measure(settings, None, tokenizer, [*golden, *long, *short], None, {})
    # By the same arithmetic: sha256 of "stop:" and the id.
    expected = sorted((r.id for r in short), key=lambda i: hashlib.sha256(f"stop:{i}".encode()).hexdigest())[:12]
    assert list(ended) == expected
    assert [answer.ended for answer in ended.values()] == [True, False] * 6
    assert generated["max_new_tokens"] == 10
    by_id = {r.id: r for r in short}
    assert generated["prompts"] == [tokenizer.prompt_ids(by_id[i].messages[:1]) for i in expected]

    # The order of the rows does not matter.
    assert answer_endings.measure(settings, None, tokenizer, short[::-1], None, {}) == ended


def test_an_answer_of_exactly_the_limit_fits_with_its_end(tokenizer: Any, generated: dict[str, Any]) -> None:
    length = len(tokenizer.answer_ids([{"role": "user", "content": "order 1"}], "refund please"))
    for limit, count in ((length, 3), (length - 1, 0)):
        settings = EvaluateConfig(max_new_tokens=limit)
        assert len(answer_endings.measure(settings, None, tokenizer, rows(3, "refund please"), None, {})) == count


def test_a_label_may_take_few_tokens_more_than_the_longest_one(tokenizer: Any, generated: dict[str, Any]) -> None:
    labels = [*LABELS, "a longer label than these"]
    answer_endings.measure(EvaluateConfig(), None, tokenizer, rows(4), labels, {})
    question = [{"role": "user", "content": "x"}]
    assert generated["max_new_tokens"] == 16 + max(len(tokenizer.answer_ids(question, label)) for label in labels)

    # The line's own limit comes first, where it is lower.
    answer_endings.measure(EvaluateConfig(max_new_tokens=9), None, tokenizer, rows(4), labels, {})
    assert generated["max_new_tokens"] == 9


def test_completions_that_exist_are_not_generated_again(tokenizer: Any, generated: dict[str, Any]) -> None:
    existing = {r.id: Completion((1,), "", "", ended=False) for r in rows(3)}
    ended = answer_endings.measure(EvaluateConfig(), None, tokenizer, rows(5), None, existing)
    assert len(generated["prompts"]) == 2
    assert [ended[r.id].ended for r in rows(3)] == [False] * 3


@pytest.mark.parametrize(
    ("useful", "empty", "count", "passed"),
    [(180, 20, 200, True), (179, 21, 200, False), (0, 200, 200, False), (16, 4, 20, None), (15, 5, 20, False)],
)
def test_a_model_that_says_nothing_does_not_pass_for_ending_at_once(
    tokenizer: Any, useful: int, empty: int, count: int, passed: bool | None
) -> None:
    stop = tokenizer.stop_ids[0]
    # A call without a word is an answer.
    answers = [Completion((5, stop), "", "<call>f()</call>", ended=True)] * useful
    answers += [Completion.from_ids([stop], tokenizer)] * empty
    names = [str(i) for i in range(count)]
    plain = [RowScore(name, "eval", 1.0, 1, correct=True) for name in names]
    scored = answer_endings.with_endings(plain, dict(zip(names, answers, strict=True)))
    rule = answers_end(scored, EvaluateConfig())
    assert rule.passed is passed
    # The share itself is what its name says.
    assert rule.value == 1.0
    assert f"of {count} answers {count} ended by themselves" in rule.text
    assert f"empty ones, which the rule does not count: {empty}" in rule.text


def test_a_text_that_asks_nothing_is_no_part_of_the_sample(tokenizer: Any, generated: dict[str, Any]) -> None:
    alone = [Row("text", "eval", [{"role": "assistant", "content": "once upon a time"}])]
    assert answer_endings.measure(EvaluateConfig(), None, tokenizer, alone, None, {}) == {}


def scores(ended: int, count: int, *, labels: bool = True) -> list[RowScore]:
    return [
        RowScore(str(i), "eval", 1.0, 1, correct=True if labels else None, values={"answers_ended": float(i < ended)})
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("ended", "count", "labels", "settings", "passed"),
    [
        (180, 200, True, {}, True),
        (179, 200, True, {}, False),
        (160, 200, False, {}, True),
        (159, 200, False, {}, False),
        (150, 200, False, {"min_stopped_fraction": 0.75}, True),
        (149, 200, False, {"min_stopped_fraction": 0.75}, False),
        # With few rows only a share that is certainly below the floor refuses. By Wilson's formula at 95 % the upper
        # end of 16 of 20 is 0.92, that of 15 of 20 is 0.89.
        (16, 20, True, {}, None),
        (15, 20, True, {}, False),
        (18, 20, True, {}, True),
        (16, 20, True, {"min_prompts": 20}, False),
        (0, 1, True, {}, False),
        (1, 1, True, {}, True),
    ],
)
def test_the_share_is_compared_with_the_floor(
    ended: int, count: int, labels: bool, settings: dict[str, Any], passed: bool | None
) -> None:
    rule = answers_end(scores(ended, count, labels=labels), EvaluateConfig(**settings))
    assert rule.passed is passed
    assert rule.value == pytest.approx(ended / count)
    assert f"of {count} answers {ended} ended by themselves" in rule.text
    assert rule.is_measured


def test_golden_rows_do_not_count() -> None:
    golden = [RowScore("g", "golden", 1.0, 1, values={"answers_ended": 0.0})]
    assert answers_end([*scores(30, 30), *golden], EvaluateConfig()).value == 1.0


@pytest.mark.parametrize(
    ("settings", "way_out"), [({"stop_rows": 0}, "evaluate.stop_rows is 0"), ({}, "raise evaluate.max_new_tokens")]
)
def test_without_a_measured_row_the_rule_names_the_setting_and_refuses_nothing(
    settings: dict[str, Any], way_out: str
) -> None:
    rule = answers_end([RowScore("a", "eval", 1.0, 1)], EvaluateConfig(**settings))
    assert (rule.passed, rule.is_measured, rule.value) == (True, False, None)
    assert way_out in rule.text
