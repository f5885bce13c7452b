"""How much is evaluation, and what a refusal for size says: every promised number is tried out."""

from __future__ import annotations

import hashlib
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.validate_data.checks import Row
from components.validate_data.sizes import (
    choose_fraction,
    explain_too_few,
    explain_too_long,
    length_limits,
    refuse_few_golden_rows,
)
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

AUTO = DataConfig()


def hashes(count: int, seed: str = "line") -> list[float]:
    """Hashes of rows that all differ, as a real data set has them."""
    return [int(hashlib.sha256(f"{seed}\n{i}".encode()).hexdigest()[:16], 16) / 2**64 for i in range(count)]


def sizes(fractions: list[float], config: DataConfig = AUTO) -> tuple[int, int]:
    """The numbers of training and of evaluation rows."""
    eval_fraction = choose_fraction(fractions, config)
    num_eval = len([f for f in fractions if f < eval_fraction])
    return len(fractions) - num_eval, num_eval


def with_settings(advice: str) -> DataConfig:
    """The settings that a refusal names."""
    settings = dict(re.findall(r"data\.(\w+): ([0-9.a-z]*[0-9a-z])", advice))
    return DataConfig.model_validate({k: v if v == "auto" else float(v) for k, v in settings.items()})


@pytest.mark.parametrize("count", [60, 61, 75, 100, 150, 299, 300, 1000, 5000])
@pytest.mark.parametrize("seed", ["line", "tickets", "x"])
def test_from_sixty_rows_on_the_defaults_give_enough_of_both(count: int, seed: str) -> None:
    num_train, num_eval = sizes(hashes(count, seed))
    assert num_eval >= 30
    assert num_train >= count / 2
    # Not much more than is needed, and never much less than a tenth.
    assert num_eval <= max(41, count * 0.1 + 4 * (count * 0.09) ** 0.5)
    assert choose_fraction(hashes(count, seed), AUTO) >= 0.1


def test_a_set_fraction_is_taken_as_it_is() -> None:
    assert choose_fraction(hashes(60), DataConfig(eval_fraction=0.05)) == 0.05


def test_auto_has_a_margin_where_the_rows_allow_one() -> None:
    assert sizes(hashes(60))[1] == 30
    assert sizes(hashes(90))[1] == 30
    assert sizes(hashes(100))[1] == 33
    # 30 and two standard deviations of a count of 30.
    assert sizes(hashes(150))[1] == 41


@pytest.mark.parametrize("before", [0.1, 0.234567, 0.5])
def test_a_fraction_never_shrinks_within_a_line_and_stays_where_it_is_enough(before: float) -> None:
    config = DataConfig(min_eval_fraction=before)
    assert choose_fraction(hashes(5000), config) == before
    assert choose_fraction(hashes(60), config) >= before
    # Fewer rows than before: it grows until there are enough.
    assert sizes(hashes(70), config)[1] >= 30


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 120), st.integers(1, 40), st.integers(1, 50), st.integers(1, 20), st.integers(0, 9))
def test_auto_takes_what_is_needed_wherever_half_of_the_rows_allow_it(
    count: int, min_train: int, min_eval: int, group: int, seed: int
) -> None:
    config = DataConfig(min_train_rows=min_train, min_eval_prompts=min_eval)
    fractions = [random.Random(f"{seed}/{i // group}").random() for i in range(count)]
    num_train, num_eval = sizes(fractions, config)
    # Tried out one by one: is there a fraction of at least 0.1 that gives both?
    thresholds = [max(0.1, f + 1e-6) for f in fractions] + [0.1]
    enough = [t for t in thresholds if len({f for f in fractions if f < t}) >= min_eval and sum(
        f < t for f in fractions) <= max(count // 2, sum(f < 0.1 for f in fractions)) and sum(
        f >= t for f in fractions) >= min_train]  # fmt: skip
    fraction = choose_fraction(fractions, config)
    num_prompts = len({f for f in fractions if f < fraction})
    assert (num_prompts >= min_eval and num_train >= min_train) == bool(enough)
    assert num_eval == sum(f < fraction for f in fractions)


def test_too_small_a_fraction_is_told_what_auto_would_give() -> None:
    fractions, config = hashes(200), DataConfig(eval_fraction=0.05)
    advice = explain_too_few(fractions, config)
    num_train, num_eval = sizes(fractions)
    assert advice == f"data.eval_fraction: auto would give {num_train} training rows and {num_eval} evaluation rows"


@pytest.mark.parametrize(("count", "changes"), [(59, {}), (45, {}), (40, {}), (150, {"min_eval_prompts": 100})])
def test_below_two_halves_one_fraction_is_named_that_gives_enough(count: int, changes: dict[str, int]) -> None:
    fractions, config = hashes(count), DataConfig(**changes)
    assert sizes(fractions, config)[1] < config.min_eval_prompts
    advice = explain_too_few(fractions, config)
    num_train, num_eval = sizes(fractions, with_settings(advice))
    assert num_eval == config.min_eval_prompts
    assert num_train >= config.min_train_rows
    assert advice.endswith(f"would give {num_train} training rows and {num_eval} evaluation rows")


def test_fewer_rows_than_all_that_is_needed_are_told_how_many_are_missing() -> None:
    advice = explain_too_few(hashes(35), AUTO)
    assert advice.startswith(
        "the data has 35 good rows of 35 different prompts, and min_eval_prompts (30, as evaluate.min_prompts and "
        "merge.min_prompts need) and min_train_rows (10) take 40 rows: add 5 rows of other prompts, or "
        "data.eval_fraction: "
    )
    assert sizes(hashes(35), with_settings(advice)) == (5, 30)
    assert with_settings(advice).min_train_rows == 5
    assert explain_too_few(hashes(20), AUTO).endswith("take 40 rows: add 20 rows of other prompts")
    assert explain_too_few([], AUTO).endswith("take 40 rows: add 40 rows of other prompts")
    # 80 rows of 20 prompts are enough rows, and not enough prompts.
    assert explain_too_few(hashes(20) * 4, AUTO).endswith("take 40 rows: add 10 rows of other prompts")


def test_one_conversation_that_is_too_large_is_named() -> None:
    advice = explain_too_few([0.05] * 500 + hashes(20), DataConfig(min_train_rows=30, min_eval_prompts=20))
    assert advice.startswith("500 of 520 rows begin with one and the same user turn")
    assert "sources.eval_data" in advice


def measured(*lengths: int, limit: int = 1024) -> list[Row]:
    rows = [Row("a.jsonl", i, [], "0" * 12, tokens=n) for i, n in enumerate(lengths, 1)]
    for item in rows:
        item.reason = "too_long" if item.tokens > limit else None
    return rows


def test_too_long_rows_are_told_the_longest_and_the_settings_that_keep_95_percent_and_all() -> None:
    lengths = [*range(1000, 1100), 5000]
    random.Random(0).shuffle(lengths)
    rows = measured(*lengths)
    limits = length_limits(rows, AUTO)
    assert limits is not None
    kept_share = sum(n <= limits["keeps_95_percent"] for n in lengths) / len(lengths)
    assert 0.95 <= kept_share < 0.96
    assert explain_too_long(rows, AUTO) == (
        "the longest has 5,000 tokens; data.max_length_tokens: 1095 keeps 95 % of the rows, "
        "data.max_length_tokens: 5000 keeps all"
    )


@pytest.mark.parametrize(
    ("lengths", "advice"),
    [
        # The present limit keeps 95 % already.
        ([10] * 99 + [2000], "the longest has 2,000 tokens; data.max_length_tokens: 2000 keeps all"),
        ([2000, 2000], "the longest has 2,000 tokens; data.max_length_tokens: 2000 keeps all"),
        # The config accepts no limit above 131,072.
        ([10] * 99 + [200_000], "the longest has 200,000 tokens"),
        (
            [2000] * 99 + [200_000],
            "the longest has 200,000 tokens; data.max_length_tokens: 2000 keeps 95 % of the rows",
        ),
        ([200_000], "the longest has 200,000 tokens, and no setting keeps 95 % of the rows; split the longest rows"),
        ([5, 1024], ""),
    ],
)
def test_a_length_that_helps_nobody_is_not_advised(lengths: list[int], advice: str) -> None:
    assert explain_too_long(measured(*lengths), AUTO) == advice


def test_golden_rows_that_decide_nothing_are_refused_before_training() -> None:
    refuse_few_golden_rows(measured(1), AUTO)
    rows = measured(*[1] * 12)
    for i, item in enumerate(rows):
        item.prompt_id = f"prompt {i // 2}"
    refuse_few_golden_rows(rows, DataConfig(min_golden_prompts=6))
    with pytest.raises(UsageError, match=r"12 rows of 6 different prompts, and evaluate\.min_golden_prompts needs 7"):
        refuse_few_golden_rows(rows, DataConfig(min_golden_prompts=7))
