"""Measure how often chance passes a challenger that should be refused: synthetic challengers exactly at the margin.

`make soak` simulates 1,000 of each kind and more (the figures of benchmarks/RESULTS.md: pytest -m soak -s
tests/evaluation/test_false_passes.py); the fast tier simulates 1,000 of the kinds that cost little.

A rate measured on 1,000 is itself uncertain by about a point. So the upper end of its interval (Clopper and Pearson,
95 %) must be below the bound, which makes the result independent of the seed: of 1,000 at most 38 may pass. Answers
that are right or wrong need no simulation: test_false_passes_exactly.py weighs every outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import bootstrap
from qlora_retrain.evaluation.bootstrap import BootstrapSettings
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules import forgetting_rule, suite_rules
from qlora_retrain.evaluation.rules.comparison import primary_metric
from qlora_retrain.evaluation.verdict import apply_rules

MARGIN = 0.05
Generator = Any  # numpy.random.Generator
Pair = tuple[list[RowScore], list[RowScore]]  # champion, challenger
Kind = Callable[[Generator, int], Pair]  # draws a pair with so many rows


def answer_scores(right: Any, slices: tuple[str, ...] = ()) -> list[RowScore]:
    return [
        RowScore(str(i), "eval", 1.0, 2, "a" if hit else "b", bool(hit), slices=slices) for i, hit in enumerate(right)
    ]


def loss_scores(nats_per_token: Any, tokens: Any) -> list[RowScore]:
    return [
        RowScore(str(i), "eval", float(x * t), int(t))
        for i, (x, t) in enumerate(zip(nats_per_token, tokens, strict=True))
    ]


def completion_scores(values: Any) -> list[RowScore]:
    return [RowScore(str(i), "eval", 1.0, 2, values={"rouge_l": float(x)}) for i, x in enumerate(values)]


def both_change(generator: Generator, rows: int) -> Pair:
    """Draw a challenger that loses 15 % of the rows and wins 10 %."""
    u = generator.random(rows)
    return answer_scores(u < 0.85), answer_scores((u < 0.70) | (u > 0.90))


def only_worse(generator: Generator, rows: int) -> Pair:
    """Draw a challenger that loses 5 % of the rows and wins none; often hardly a row tells the two apart."""
    u = generator.random(rows)
    return answer_scores(u < 0.85), answer_scores(u < 0.80)


def even_losses(generator: Generator, rows: int) -> Pair:
    tokens = generator.integers(3, 40, rows)
    before = generator.gamma(2.0, 1.0, rows)
    return loss_scores(before, tokens), loss_scores(before + MARGIN + generator.normal(0, 0.3, rows), tokens)


def skewed_losses(generator: Generator, rows: int) -> Pair:
    """Draw differences that are gamma distributed (skewness 1.4): most rows gain a little, some lose more."""
    tokens = generator.integers(3, 40, rows)
    before = generator.gamma(2.0, 1.0, rows)
    return loss_scores(before, tokens), loss_scores(before + MARGIN + generator.gamma(2.0, 0.3, rows) - 0.6, tokens)


def lognormal_losses(sigma: float) -> Kind:
    """Draw lognormal differences: a few rows cause the loss, and a sample often has none of them."""

    def kind(generator: Generator, rows: int) -> Pair:
        tokens = generator.integers(3, 40, rows)
        before = generator.gamma(2.0, 1.0, rows)
        after = before + MARGIN + 0.3 * (generator.lognormal(0, sigma, rows) - np.exp(sigma**2 / 2))
        return loss_scores(before, tokens), loss_scores(after, tokens)

    kind.__name__ = f"lognormal_losses({sigma})"
    return kind


def heavy_on_both_sides(generator: Generator, rows: int) -> Pair:
    """Draw differences from Student's t with 3 degrees of freedom: no skewness, and extreme rows on either side."""
    tokens = generator.integers(3, 40, rows)
    before = generator.gamma(2.0, 1.0, rows)
    return loss_scores(before, tokens), loss_scores(before + MARGIN + 0.3 * generator.standard_t(3, rows), tokens)


def all_or_nothing(generator: Generator, rows: int) -> Pair:
    """Draw completions: on 5 % of the rows the challenger scores 0 and the champion 1; on the others they are alike."""
    lost = generator.random(rows) < MARGIN
    level = np.where(lost, 1.0, generator.random(rows))
    return completion_scores(level), completion_scores(np.where(lost, 0.0, level))


def false_passes(kind: Kind, rows: int, challengers: int, *, samples: int = 1000) -> int:
    """Count the challengers, truly worse by exactly the margin, that pass the rule against the champion."""
    settings = EvaluateConfig(max_loss_to_champion=MARGIN, bootstrap_samples=samples)

    def passes(champion: list[RowScore], challenger: list[RowScore]) -> bool:
        scores = {"base": champion, "champion": champion, "challenger": challenger}
        # Completions are compared by ROUGE-L, all others by their default metric.
        metric = "rouge_l" if champion[0].values else primary_metric(scores)
        return next(suite_rules.losses_to_rivals(scores, metric, settings)).passed is True

    return count_passes(passes, kind, rows, challengers, seed=5)


def false_gains(kind: Kind, rows: int, challengers: int) -> int:
    """Count the challengers, truly better than the base by exactly the required gain, that count as better."""
    settings = EvaluateConfig(min_gain_over_base=MARGIN, bootstrap_samples=1000)

    def passes(better: list[RowScore], worse: list[RowScore]) -> bool:
        scores = {"base": worse, "challenger": better}
        return suite_rules.gain_over_base(scores, primary_metric(scores), settings).passed is True

    return count_passes(passes, kind, rows, challengers, seed=8)


def passage_scores(tokens: Any, nats: Any, hits: Any) -> list[RowScore]:
    return [
        RowScore(str(i), "reference", float(x), int(t), hits=int(h))
        for i, (t, x, h) in enumerate(zip(tokens, nats, hits, strict=True))
    ]


def forgotten_nats(generator: Generator, rows: int) -> Pair:
    """Draw passages that lose exponentially distributed nats per token, on average the margin."""
    tokens = generator.integers(20, 200, rows)
    lost = generator.exponential(MARGIN, rows) * tokens
    return passage_scores(tokens, 3.0 * tokens, 0 * tokens), passage_scores(tokens, 3.0 * tokens + lost, 0 * tokens)


def forgotten_tokens(generator: Generator, rows: int) -> Pair:
    """Draw passages in which a share of the tokens is no longer right; it varies, and is on average the margin."""
    tokens = generator.integers(20, 200, rows)
    lost = generator.binomial(tokens, generator.beta(1.0, 1 / MARGIN - 1, rows))
    return passage_scores(tokens, tokens, tokens), passage_scores(tokens, tokens, tokens - lost)


def rarely_forgotten_tokens(generator: Generator, rows: int) -> Pair:
    """Draw passages of which one in five loses a quarter of its tokens and the others none; often none was drawn."""
    tokens = generator.integers(20, 200, rows)
    lost = np.where(generator.random(rows) < 0.2, generator.binomial(tokens, 0.25), 0)
    return passage_scores(tokens, tokens, tokens), passage_scores(tokens, tokens, tokens - lost)


def false_forgetting_passes(kind: Kind, rows: int, challengers: int) -> int:
    """Count the challengers, which forgot exactly as much as is allowed, that pass the rule on reference text."""
    settings, metric = EvaluateConfig(bootstrap_samples=1000), "loss" if kind is forgotten_nats else "token_accuracy"

    def passes(base: list[RowScore], challenger: list[RowScore]) -> bool:
        scores = {"base": base, "challenger": challenger}
        return forgetting_rule.forgetting(scores, settings, metric, MARGIN).passed is True

    return count_passes(passes, kind, rows, challengers, seed=12)


def count_passes(passes: Callable[..., bool], kind: Kind, rows: int, challengers: int, seed: int) -> int:
    """Draw pairs of the kind and count those that pass."""
    generator = np.random.default_rng(seed)
    # One generator for all pairs, so that they are independent of each other.
    return sum(passes(*kind(generator, rows)) for _ in range(challengers))


def rate_upper_bound(passed: int, challengers: int) -> float:
    """Return Clopper and Pearson's upper end (1934): the true rate is below it with a confidence of 95 %."""
    return float(beta.ppf(0.95, passed + 1, challengers - passed))


KINDS = [(both_change, 100), (both_change, 400), (only_worse, 100), (only_worse, 400), (even_losses, 40),
         (even_losses, 200), (skewed_losses, 40), (skewed_losses, 200), (heavy_on_both_sides, 40)]  # fmt: skip
# Nearer to the bound, so more of them are simulated.
SKEWED = [(lognormal_losses(1.0), 40), (lognormal_losses(1.0), 100), (lognormal_losses(1.25), 100),
          (lognormal_losses(1.5), 400), (all_or_nothing, 40), (all_or_nothing, 100)]  # fmt: skip


@pytest.mark.parametrize(("kind", "rows"), [(even_losses, 40), (skewed_losses, 60)])
def test_few_challengers_at_the_margin_pass_by_chance(kind: Kind, rows: int) -> None:
    # Of 1,000 at most 38 may pass.
    assert rate_upper_bound(false_passes(kind, rows, 1000), 1000) <= 0.05
    assert rate_upper_bound(false_gains(kind, rows, 1000), 1000) <= 0.05


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "rows"), KINDS)
def test_of_a_thousand_challengers_at_the_margin_at_most_one_in_twenty_passes(kind: Kind, rows: int) -> None:
    passed = false_passes(kind, rows, 1000)
    print(f"\n{kind.__name__}, {rows} rows: {passed / 1000:.1%} of 1,000 passed")
    assert rate_upper_bound(passed, 1000) <= 0.05


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "rows"), [(even_losses, 40), (even_losses, 200), (skewed_losses, 40),
                                            (skewed_losses, 200), (heavy_on_both_sides, 40)])  # fmt: skip
def test_of_those_with_exactly_the_required_gain_at_most_one_in_twenty_counts_as_better(kind: Kind, rows: int) -> None:
    simulated = 6000 if kind is heavy_on_both_sides else 1000  # it is nearer to the bound
    passed = false_gains(kind, rows, simulated)
    print(f"\n{kind.__name__}, {rows} rows: {passed / simulated:.1%} of {simulated:,} counted as better")
    assert rate_upper_bound(passed, simulated) <= 0.05


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "rows"), SKEWED)
def test_where_few_rows_decide_at_most_one_in_twenty_passes(kind: Kind, rows: int) -> None:
    passed = false_passes(kind, rows, 6000)
    print(f"\n{kind.__name__}, {rows} rows: {passed / 6000:.1%} of 6,000 passed")
    assert rate_upper_bound(passed, 6000) <= 0.05


@pytest.mark.soak
@pytest.mark.parametrize(("sigma", "rows"), [(1.0, 30), (1.25, 40), (1.5, 40)])
def test_with_the_fewest_rows_only_a_few_more_pass(sigma: float, rows: int) -> None:
    """This is the limit of any statistics: with few rows the ones that matter may not be among them."""
    passed = false_passes(lognormal_losses(sigma), rows, 2000)
    print(f"\nlognormal_losses({sigma}), {rows} rows: {passed / 2000:.1%} of 2,000 passed")
    # Above the bound of 5 %: docs/verdict.md advises more rows for such data.
    assert passed / 2000 <= 0.09


@pytest.mark.soak
@pytest.mark.parametrize("rows", [16, 40])
@pytest.mark.parametrize("kind", [forgotten_nats, forgotten_tokens, rarely_forgotten_tokens])
def test_of_those_that_forgot_as_much_as_is_allowed_at_most_one_in_twenty_passes(kind: Kind, rows: int) -> None:
    passed = false_forgetting_passes(kind, rows, 2000)
    print(f"\n{kind.__name__}, {rows} passages: {passed / 2000:.1%} of 2,000 passed")
    assert rate_upper_bound(passed, 2000) <= 0.05


@pytest.mark.soak
@pytest.mark.parametrize("kind", [skewed_losses, lognormal_losses(1.0)])
def test_with_few_resamples_no_more_pass(kind: Kind) -> None:
    """With 200 resamples the far end of a long tail lies beyond what they resolve."""
    passed = false_passes(kind, 40, 6000, samples=200)
    print(f"\n{kind.__name__}, 40 rows, 200 draws: {passed / 6000:.1%} of 6,000 passed")
    assert rate_upper_bound(passed, 6000) <= 0.05


@pytest.mark.soak
def test_a_challenger_equal_to_the_champion_is_seldom_refused_for_one_of_many_slices() -> None:
    generator = np.random.default_rng(6)
    settings = EvaluateConfig(
        max_loss_to_champion=1.0, max_slice_regression=0.0, min_slice_prompts=20, allow_first_release=True
    )
    refused = 0
    for _ in range(1000):
        champion, challenger = [], []
        for label in range(12):
            for side in (champion, challenger):
                # Both sides are right in 85 % of the rows, independently of each other.
                rows = answer_scores(generator.random(25) < 0.85, (f"label={label}",))
                side += [
                    RowScore(f"{label}-{s.id}", "eval", 1.0, 2, s.predicted, s.correct, slices=s.slices) for s in rows
                ]
        verdict = apply_rules({"base": champion, "champion": champion, "challenger": challenger}, settings)
        refused += next(r for r in verdict.rules if r.name == "slices").passed is False
    print(f"\n12 slices of 25 rows: {refused / 1000:.1%} of 1,000 refused for one of them")
    assert refused / 1000 <= 0.05


@pytest.mark.soak
@pytest.mark.parametrize("kind", [even_losses, skewed_losses, heavy_on_both_sides])
def test_of_eighty_slices_compared_by_loss_one_is_seldom_broken_by_chance(kind: Kind) -> None:
    """Each has a confidence of 1 - 0.05 / 80, where an end lies beyond what 2,000 resamples resolve."""
    generator, simulated = np.random.default_rng(10), 40_000
    settings = BootstrapSettings.from_config(EvaluateConfig(), confidence=1 - 0.05 / 80)
    broken = 0
    for _ in range(simulated):
        before, after = kind(generator, 20)
        # The loss of the challenger, the second of the pair, minus the margin; the true mean is 0.
        lost = [b.loss_nats - a.loss_nats - MARGIN * a.tokens for a, b in zip(before, after, strict=True)]
        broken += bootstrap.difference_interval(lost, [s.tokens for s in before], settings).low > 0
    print(f"\n{kind.__name__}, 80 slices of 20 rows: {80 * broken / simulated:.1%} refused for one of them")
    assert 80 * rate_upper_bound(broken, simulated) <= 0.05
