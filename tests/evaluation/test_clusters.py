"""Check that intervals, tests and minimum numbers count prompts, and that nothing changes with one row a prompt."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import bootstrap, clusters, rows, stats
from qlora_retrain.evaluation.bootstrap import BootstrapSettings
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.stats import Interval
from qlora_retrain.evaluation.verdict import Verdict, apply_rules

SETTINGS = BootstrapSettings(confidence=0.95, samples=500, seed=3)
FIRST = EvaluateConfig(allow_first_release=True, bootstrap_samples=200)


class Sample:
    """Rows of two contestants: right or wrong answers, numbers with weights, and labels."""

    def __init__(self, size: int = 60, seed: int = 36) -> None:
        generator = random.Random(seed)
        self.first = [generator.random() < 0.8 for _ in range(size)]
        self.second = [generator.random() < 0.7 for _ in range(size)]
        self.values = [generator.lognormvariate(0, 1) - 1.5 for _ in range(size)]
        self.weights = [generator.randint(1, 30) for _ in range(size)]
        self.labels = [generator.choice("abc") for _ in range(size)]
        self.predicted = [a if generator.random() < 0.7 else generator.choice("abc") for a in self.labels]
        self.prompts = [f"prompt {i}" for i in range(size)]

    def repeated(self, times: int) -> Sample:
        """Return the sample with every row so many times, as rows of one prompt."""
        sample = Sample(0)
        for name, column in vars(self).items():
            setattr(sample, name, [value for value in column for _ in range(times)])
        return sample


def tango(sample: Sample, prompts: Sequence[str] | None) -> Interval:
    return stats.paired_proportion_interval(sample.first, sample.second, confidence=0.95, prompts=prompts)


def wilson(sample: Sample, prompts: Sequence[str] | None) -> Interval:
    hits = sample.first
    effect = clusters.design_effect([int(hit) for hit in hits], prompts, extremes=(0.0, 1.0))
    return stats.proportion_interval(sum(hits), len(hits), confidence=0.95, design_effect=effect)


def mcnemar(sample: Sample, prompts: Sequence[str] | None) -> Interval:
    p = stats.mcnemar_p_value(sample.first, sample.second, prompts)
    return Interval(p, p, p)


def ratio(sample: Sample, prompts: Sequence[str] | None) -> Interval:
    return bootstrap.ratio_interval(sample.values, sample.weights, SETTINGS, prompts)


def difference(sample: Sample, prompts: Sequence[str] | None) -> Interval:
    return bootstrap.difference_interval(sample.values, sample.weights, SETTINGS, prompts=prompts)


def bounded(sample: Sample, prompts: Sequence[str] | None) -> Interval:
    values = [max(-1.0, min(1.0, value)) for value in sample.values]
    return bootstrap.difference_interval(values, None, SETTINGS, prompts=prompts, bounded=True)


def macro_f1(sample: Sample, prompts: Sequence[str] | None) -> Interval:
    return bootstrap.macro_f1_interval(sample.labels, sample.predicted, SETTINGS, prompts)


# What the release before computed, which took every row for independent.
BEFORE = {
    tango: (-0.08333333333333333, -0.2339003704109064, 0.06923330378505185),
    wilson: (0.7333333333333333, 0.6099128690331636, 0.8286735999671945),
    mcnemar: (0.3833103179931644,) * 3,
    ratio: (0.00845155046547179, -0.018728817077950696, 0.04169425448393579),
    difference: (0.00845155046547179, -0.018728817077950696, 0.07903737122768466),
    bounded: (-0.16210734908686011, -0.3708377594783424, 0.07580803434649075),
    macro_f1: (0.746637335009428, 0.6319658594930334, 0.8540186529157117),
}
Compute = Callable[[Sample, Sequence[str] | None], Interval]
ALL = pytest.mark.parametrize("compute", BEFORE)


@ALL
def test_with_one_row_a_prompt_nothing_changes(compute: Compute) -> None:
    sample = Sample()
    for prompts in (None, sample.prompts):
        interval = compute(sample, prompts)
        assert (interval.value, interval.low, interval.high) == pytest.approx(BEFORE[compute], rel=1e-11, abs=0)
    # To the last bit, whatever the machine's libraries compute.
    assert compute(sample, sample.prompts) == compute(sample, None)


@ALL
def test_rows_that_repeat_a_prompt_are_no_further_evidence(compute: Compute) -> None:
    sample = Sample()
    many = sample.repeated(5)
    once, repeated = compute(sample, None), compute(many, many.prompts)
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx((once.value, once.low, once.high), abs=1e-9)
    # Taken for independent rows, they would be.
    assert compute(many, None) != pytest.approx(repeated, abs=1e-3)


def test_the_bootstrap_draws_whole_prompts() -> None:
    generator = random.Random(4)
    prompts = [f"{i}" for i in range(50) for _ in range(generator.randint(1, 12))]
    level = {prompt: generator.gauss(0, 1) for prompt in prompts}
    values, weights = [level[p] + generator.gauss(0, 0.3) for p in prompts], [generator.randint(1, 9) for _ in prompts]
    members = [[i for i, p in enumerate(prompts) if p == prompt] for prompt in dict.fromkeys(prompts)]

    ratios = []
    for _ in range(4000):
        indices = [i for group in generator.choices(members, k=50) for i in group]
        ratios.append(sum(values[i] for i in indices) / sum(weights[i] for i in indices))
    ratios.sort()
    settings = BootstrapSettings(confidence=0.95, samples=4000, seed=1)
    interval = bootstrap.ratio_interval(values, weights, settings, prompts)
    error = statistics.stdev(ratios)
    assert interval.low == pytest.approx(ratios[100], abs=0.2 * error)
    assert interval.high == pytest.approx(ratios[3899], abs=0.2 * error)

    # The order of the rows changes only which prompt is called the first, and so the draws.
    order = generator.sample(range(len(prompts)), len(prompts))
    shuffled = bootstrap.ratio_interval(
        [values[i] for i in order], [weights[i] for i in order], settings, [prompts[i] for i in order]
    )
    assert shuffled.value == pytest.approx(interval.value)
    assert (shuffled.low, shuffled.high) == pytest.approx((interval.low, interval.high), abs=0.2 * error)


def test_macro_f1_draws_whole_prompts() -> None:
    generator = random.Random(9)
    prompts = [f"{i}" for i in range(40) for _ in range(3)]
    is_right = {prompt: generator.random() < 0.7 for prompt in prompts}
    answers = [generator.choice("abcd") for _ in prompts]
    predicted = [a if is_right[p] else generator.choice("abcd") for a, p in zip(answers, prompts, strict=True)]
    resampled = []
    for _ in range(2000):
        indices = [3 * k + i for k in generator.choices(range(40), k=40) for i in range(3)]
        resampled.append(stats.macro_f1([answers[i] for i in indices], [predicted[i] for i in indices]))
    resampled.sort()
    interval = bootstrap.macro_f1_interval(answers, predicted, BootstrapSettings(0.95, 4000, 7), prompts)
    assert interval.value == stats.macro_f1(answers, predicted)
    assert (interval.low, interval.high) == pytest.approx((resampled[50], resampled[1949]), abs=0.03)


def test_the_design_effect_is_the_size_of_prompts_whose_rows_are_alike_and_about_1_of_independent_rows() -> None:
    generator = random.Random(5)
    prompts = [f"{i}" for i in range(400) for _ in range(6)]
    alike = {prompt: float(generator.random() < 0.3) for prompt in prompts}
    effect = clusters.design_effect([alike[p] for p in prompts], prompts, extremes=(0.0, 1.0))
    assert effect == pytest.approx(6)
    independent = [float(generator.random() < 0.3) for _ in prompts]
    assert clusters.design_effect(independent, prompts, extremes=(0.0, 1.0)) == pytest.approx(1.0, abs=0.15)

    # Rows that differ within every prompt in the same way would tell more than independent ones; this is not used.
    balanced = [float(i % 2) for i in range(len(prompts))]
    assert clusters.design_effect(balanced, prompts, extremes=(0.0, 1.0)) == 1.0
    # Where no row differs, nothing shows that the rows of a prompt are not alike.
    assert clusters.design_effect([0.0] * len(prompts), prompts, extremes=(-1.0, 1.0)) == pytest.approx(6)


def test_unequal_prompts_count_as_fewer() -> None:
    prompts = ["large"] * 90 + [f"{i}" for i in range(10)]
    # 100 rows, of which 90 could be one row: 100^2 / (90^2 + 10) prompts of equal size.
    assert len(prompts) / clusters.mean_prompt_rows(prompts) == pytest.approx(10_000 / 8110)
    wide = stats.paired_proportion_interval([True] * 100, [True] * 100, confidence=0.95, prompts=prompts)
    assert wide.high == pytest.approx(stats.smallest_excludable_loss(10_000 / 8110, 0.95))
    assert wide.high > 0.7


@pytest.mark.parametrize("seed", range(6))
def test_mcnemars_test_gives_every_prompt_a_fair_coin(seed: int) -> None:
    generator = random.Random(seed)
    prompts = [f"{i}" for i in range(9) for _ in range(generator.randint(1, 5))]
    first, second = ([generator.random() < share for _ in prompts] for share in (0.8, 0.4))
    differences = clusters.sum_by_prompt([int(a) - int(b) for a, b in zip(first, second, strict=True)], prompts)
    # All 512 signs are equally likely.
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=9)
    ]
    expected = sum(abs(total) >= abs(sum(differences)) for total in sums) / 512
    assert stats.mcnemar_p_value(first, second, prompts) == pytest.approx(expected)


def test_mcnemars_test_agrees_with_obuchowskis_where_prompts_are_many() -> None:
    from scipy.stats import chi2

    generator = random.Random(2)
    prompts = [f"{i}" for i in range(1500) for _ in range(4)]
    lost = {prompt: generator.random() < 0.02 for prompt in prompts}
    first = [generator.random() < 0.9 for _ in prompts]
    second = [generator.random() < (0.6 if lost[p] else 0.9) for p in prompts]
    differences = clusters.sum_by_prompt([int(a) - int(b) for a, b in zip(first, second, strict=True)], prompts)
    statistic = sum(differences) ** 2 / sum(d * d for d in differences)
    p = stats.mcnemar_p_value(first, second, prompts)
    assert p == pytest.approx(chi2.sf(statistic, 1), rel=0.1)
    assert 1e-5 < p < 0.5


def scores_of(right: Sequence[bool], rows_per_prompt: int, suite: str = "eval", **fields: Any) -> list[RowScore]:
    """Score label rows, of which so many in a row have one prompt."""
    return [
        RowScore(f"{suite}{i}", suite, 1.0, 2, "a" if hit else "b", hit, prompt_id=f"p{i // rows_per_prompt}", **fields)
        for i, hit in enumerate(right)
    ]


def decide(rows_per_prompt: int, size: int = 200, settings: EvaluateConfig = FIRST, **fields: Any) -> Verdict:
    base = scores_of([i % 10 == 0 for i in range(size)], rows_per_prompt, **fields)
    return apply_rules({"base": base, "challenger": scores_of([True] * size, rows_per_prompt, **fields)}, settings)


def test_min_prompts_counts_different_prompts() -> None:
    assert decide(1).decision == decide(6).decision == "pass"
    verdict = decide(10)
    assert verdict.decision == "insufficient evidence"
    assert verdict.sentence == (
        "insufficient evidence: 200 evaluation rows of 20 different prompts; at least 30 different prompts are needed "
        "(evaluate.min_prompts)"
    )
    (rule,) = verdict.rules
    assert (rule.name, rule.value, rule.limit) == ("enough_prompts", 20, 30)


def test_a_slice_needs_different_prompts() -> None:
    settings = FIRST.model_copy(update={"slice_floors": {"label=a": 0.5}})
    verdict = decide(6, settings=settings, slices=("label=a",))
    assert "; the floor is 0.5" in next(r.text for r in verdict.rules if r.name == "slice_floor label=a")
    assert next(r.text for r in verdict.rules if r.name == "slices").count("on 200 rows of 34 different prompts") == 1

    settings = settings.model_copy(update={"min_slice_prompts": 35})
    verdict = decide(6, settings=settings, slices=("label=a",))
    assert "label=a has evaluation rows of 34 different prompts; at least 35 are needed" in verdict.sentence
    assert "no slice has 35 different prompts (evaluate.min_slice_prompts)" in verdict.sentence


def test_golden_rows_need_different_prompts() -> None:
    def verdict(rows_per_prompt: int) -> Verdict:
        golden = scores_of([True] * 20, rows_per_prompt, "golden")
        evaluation = [scores_of([hit] * 60, 1) for hit in (False, True)]
        return apply_rules({"base": evaluation[0] + golden, "challenger": evaluation[1] + golden}, FIRST)

    assert verdict(2).decision == "pass"
    assert verdict(4).sentence == (
        "insufficient evidence: 20 golden rows of 5 different prompts; at least 10 different prompts are needed "
        "(evaluate.min_golden_prompts)"
    )


def test_what_no_rows_of_so_few_prompts_can_show_is_missing_evidence() -> None:
    rows_ = scores_of([True] * 400, 10)
    settings = EvaluateConfig(max_loss_to_champion=0.05)
    verdict = apply_rules({"base": scores_of([False] * 400, 10), "champion": rows_, "challenger": rows_}, settings)
    assert verdict.decision == "insufficient evidence"
    # As 40 independent rows, and not as 400.
    assert "400 rows of 40 different prompts can rule out no loss below 0.088" in verdict.sentence


def write(path: Path, *records: str) -> Path:
    path.write_text("".join(f"{record}\n" for record in records), encoding="utf-8")
    return path


def test_rows_state_their_prompt_and_older_ones_have_it_derived(tmp_path: Path) -> None:
    def record(number: int, question: str, extra: str = "") -> str:
        turns = f'[{{"role": "user", "content": "{question}"}}, {{"role": "assistant", "content": "answer {number}"}}]'
        return f'{{"id": "{number}"{extra}, "messages": {turns}}}'

    stated = [record(i, f"question {i}", ', "prompt_id": "p"') for i in range(3)]
    assert rows.count_prompts(rows.read_rows(write(tmp_path / "eval.jsonl", *stated), "eval")) == 1
    derived = [record(0, "Where is it?"), record(1, "where  IS it?"), record(2, "Who is it?")]
    read = rows.read_rows(write(tmp_path / "eval.jsonl", *derived), "eval")
    assert read[0].prompt == read[1].prompt != read[2].prompt
    assert rows.describe_rows(read) == "3 rows of 2 different prompts"
    assert rows.describe_rows(read[1:]) == "2 rows"


def test_scores_keep_the_prompt_and_those_without_one_are_read(tmp_path: Path) -> None:
    scores = {"challenger": scores_of([True, False, True], 2)}
    rows.write_scores(tmp_path / "scores.jsonl", scores)
    assert rows.read_scores(tmp_path / "scores.jsonl") == scores
    older = write(tmp_path / "scores.jsonl", *(
        f'{{"contestant": "base", "id": "{i}", "suite": "eval", "loss_nats": 1.0, "tokens": 2}}' for i in range(3)
    ))  # fmt: skip
    assert rows.count_prompts(rows.read_scores(older)["base"]) == 3
