"""Apply the rules over whole suites: gain over the base, losses to champion and anchor, floors, golden, forgetting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import bootstrap, clusters, stats
from qlora_retrain.evaluation.bootstrap import BootstrapSettings
from qlora_retrain.evaluation.rows import count_prompts, describe_rows
from qlora_retrain.evaluation.rules import forgetting_rule
from qlora_retrain.evaluation.rules.comparison import (
    BINARY_METRICS,
    Metric,
    Scores,
    comparable_pairs,
    count_prompts_with_metric,
    count_rows_with_metric,
    display_name,
    gain_interval,
    has_metric,
    metric_interval,
    metric_value,
    primary_metric,
    rows_of_suite,
)
from qlora_retrain.evaluation.rules.ending_rule import answers_end
from qlora_retrain.evaluation.rules.rule_result import RuleResult, format_interval


def apply(scores: Scores, settings: EvaluateConfig, *, is_final: bool = True) -> Iterator[RuleResult]:
    """Apply every rule over whole suites that the line's settings ask for.

    Args:
        scores: The contestants' scores.
        settings: The limits.
        is_final: Whether the challenger is the form that ships; of any other, forgetting is only reported.
    """
    metric = primary_metric(scores, settings)
    prompts = count_prompts_with_metric(scores, "eval", metric)
    # Without enough values of the primary metric no comparison means anything, so no other rule is applied.
    if prompts == 0:
        text = f"{display_name(metric)} is the primary metric, but it is defined for no evaluation row"
        yield RuleResult("primary_metric", text)
        return
    if prompts < settings.min_prompts:
        text = f"{display_name(metric)} is the primary metric, and it is defined for evaluation rows of {prompts} "
        text += f"different prompts; at least {settings.min_prompts} are needed (evaluate.min_prompts)"
        yield RuleResult("primary_metric", text, prompts, limit=settings.min_prompts)
        return

    yield gain_over_base(scores, metric, settings)
    yield from losses_to_rivals(scores, metric, settings)

    if settings.min_accuracy is not None:
        yield metric_floor("accuracy_floor", "accuracy", scores, settings, settings.min_accuracy)
    for name, limit in settings.floors.items():
        yield metric_floor(f"{name}_floor", name, scores, settings, limit)

    yield answers_end(scores["challenger"], settings)

    if rows_of_suite(scores["challenger"], "golden"):
        yield golden_rows(scores, metric, settings)

    yield from forgetting_rule.apply(scores, settings, is_final=is_final)


def gain_over_base(scores: Scores, metric: Metric, settings: EvaluateConfig) -> RuleResult:
    """Check that the challenger is certainly better than the base."""
    limit = settings.min_gain_over_base
    prompts = count_prompts(ours for ours, _ in comparable_pairs(scores, "base", "eval", metric))
    if prompts < settings.min_prompts:
        text = f"rows of {prompts} different prompts can be compared with the base, and at least "
        text += f"{settings.min_prompts} are needed (evaluate.min_prompts; evaluate.base_rows says how many are scored)"
        return RuleResult("gain_over_base", text, prompts, limit=settings.min_prompts)
    # The rule uses the lower end and not the value, because a measured gain may be due to chance.
    gain = gain_interval(scores, "base", "eval", metric, settings)
    text = f"{display_name(metric)} against the base: {format_interval(gain)}; its lower end must lie above {limit:g}"
    text += _mcnemar_note(scores, "base", metric)
    return RuleResult.from_interval("gain_over_base", text, gain, limit, gain.low > limit)


def losses_to_rivals(scores: Scores, metric: Metric, settings: EvaluateConfig) -> Iterator[RuleResult]:
    """Check that the challenger is not worse than the champion, nor than the line's best version, by a margin.

    Where the champion is the best version, `anchor` is not among the scores, and the champion stands in for it.
    """
    limit = settings.max_loss_to_champion
    if "champion" not in scores:
        if settings.allow_first_release:
            text = "there is no champion yet; allow_first_release allows that"
            yield RuleResult("loss_to_champion", text, limit=limit, passed=True)
            return
        text = "there is no champion to compare with; set evaluate.allow_first_release: true to allow the first version"
        yield RuleResult("loss_to_champion", text, limit=limit)
        return

    # Each version may be a little worse than its champion, so only the anchor stops ten small losses in a row.
    yield _loss_to_rival("champion", "champion", scores, metric, settings, limit)
    limit = limit if settings.max_loss_to_anchor is None else settings.max_loss_to_anchor
    anchor = "anchor" if "anchor" in scores else "champion"
    yield _loss_to_rival("anchor", anchor, scores, metric, settings, limit)


def _loss_to_rival(
    role: str, rival: str, scores: Scores, metric: Metric, settings: EvaluateConfig, limit: float
) -> RuleResult:
    """Check the loss to the contestant `rival`, which has the role `champion` or `anchor`."""
    title = "champion" if role == "champion" else "best version so far" + (", the champion" if rival != role else "")
    # Rows that the rival's own template refuses cannot be compared.
    rows = [ours for ours, _ in comparable_pairs(scores, rival, "eval", metric)]
    left_out, prompts = count_rows_with_metric(scores, "eval", metric) - len(rows), count_prompts(rows)
    if prompts < settings.min_prompts:
        text = f"the {title}'s own chat template refuses {left_out} of the evaluation rows; rows of {prompts} "
        text += f"different prompts can be compared, and at least {settings.min_prompts} are needed "
        text += "(evaluate.min_prompts); a line of another name starts without it"
        return RuleResult(f"loss_to_{role}", text, prompts, limit=settings.min_prompts)

    loss = gain_interval(scores, rival, "eval", metric, settings).negated
    text = f"{display_name(metric)} lost to the {title}: {format_interval(loss)}; "
    text += f"its upper end must not lie above {limit:g}"
    text += f"; {left_out} rows are left out, since its own chat template refuses them" if left_out else ""

    # With too few prompts not even equal answers could pass. That is missing evidence, not a worse challenger.
    independent_rows = len(rows) / clusters.mean_prompt_rows([row.prompt for row in rows])
    excludable = stats.smallest_excludable_loss(independent_rows, settings.confidence)
    if metric in BINARY_METRICS and loss.high > limit >= loss.value and excludable > limit:
        text += f". {describe_rows(rows)} can rule out no loss below {excludable:.3f}, even if all are answered alike"
        return RuleResult.from_interval(f"loss_to_{role}", text, loss, limit)

    text += _mcnemar_note(scores, rival, metric)
    return RuleResult.from_interval(f"loss_to_{role}", text, loss, limit, loss.high <= limit)


def metric_floor(name: str, metric: Metric, scores: Scores, settings: EvaluateConfig, limit: float) -> RuleResult:
    """Check that the measured value of a metric is not below a limit."""
    rows = [
        row for row in rows_of_suite(scores["challenger"], "eval") if metric == "macro_f1" or has_metric(row, metric)
    ]
    if not rows or (metric == "macro_f1" and not has_metric(rows[0], "accuracy")):
        text = f"a floor for {display_name(metric)} is set, but this task has no {display_name(metric)} to measure"
        return RuleResult(name, text, limit=limit)

    if metric == "macro_f1":  # the one metric that is no mean over rows
        interval = bootstrap.macro_f1_interval(
            [_true_label(row.slices, row.predicted, row.correct) for row in rows],
            [str(row.predicted) for row in rows],
            BootstrapSettings.from_config(settings),
            [row.prompt for row in rows],
        )
    else:
        interval = metric_interval(rows, metric, settings)
    # The rule uses the measured value and not its lower end, because a floor is a target and not a proof.
    text = f"{display_name(metric)} {format_interval(interval, sign='')}; the floor is {limit:g}"
    return RuleResult.from_interval(name, text, interval, limit, interval.value >= limit)


def golden_rows(scores: Scores, metric: Metric, settings: EvaluateConfig) -> RuleResult:
    """Check that the challenger is not certainly worse than the champion, or the base, on the golden rows."""
    rival = "champion" if "champion" in scores else "base"
    rows = [ours for ours, _ in comparable_pairs(scores, rival, "golden", metric)]
    prompts = count_prompts(rows)
    if prompts < settings.min_golden_prompts:  # which is at least 1
        undefined = len(rows_of_suite(scores["challenger"], "golden")) - len(rows)
        text = f"{len(rows)} golden rows of {prompts} different prompts"
        text += f" beside {undefined} rows for which {display_name(metric)} cannot be compared" if undefined else ""
        text += f"; at least {settings.min_golden_prompts} different prompts are needed (evaluate.min_golden_prompts)"
        return RuleResult("golden", text, prompts, limit=settings.min_golden_prompts)

    # Only a certain loss refuses, since with so few rows almost every challenger may be worse.
    loss = gain_interval(scores, rival, "golden", metric, settings).negated
    text = f"{display_name(metric)} lost to the {rival} on the golden rows: {format_interval(loss)}; "
    text += "it must not lie wholly above 0"
    return RuleResult.from_interval("golden", text, loss, 0.0, loss.low <= 0.0)


def best_contestant(scores: Scores, settings: EvaluateConfig) -> str:
    """Return which contestant is the line's best version from now on: `challenger`, `anchor` or `champion`.

    The challenger takes that place only where it is certainly better. Otherwise each version of a series could be a
    little worse by chance, and the best version would get worse with them.
    """
    # There is an anchor only where the champion is not itself the best version.
    holder = next((name for name in ("anchor", "champion") if name in scores), None)
    if holder is None:
        return "challenger"
    metric = primary_metric(scores, settings)
    if not comparable_pairs(scores, holder, "eval", metric):
        return holder
    gain = gain_interval(scores, holder, "eval", metric, settings)
    return "challenger" if gain.low > 0 else holder


def compare_contestants(scores: Scores, settings: EvaluateConfig) -> list[dict[str, Any]]:
    """Compare the challenger with every contestant, for the report's forest plot and `evaluation.json`.

    A gain above 0 means that the challenger is better.
    """
    metric = primary_metric(scores, settings)
    champion, anchor = settings.max_loss_to_champion, settings.max_loss_to_anchor
    # The limits on losses, as limits on gains.
    limits = {
        "base": settings.min_gain_over_base,
        "champion": -champion,
        "anchor": -(champion if anchor is None else anchor),
    }

    differences: list[dict[str, Any]] = []
    for suite in ("eval", "golden"):
        for rival in (r for r in ("base", "base_nf4", "champion", "anchor") if r in scores):
            if not comparable_pairs(scores, rival, suite, metric):
                continue
            # The rule on golden rows has no limit that a plot could show.
            gain = gain_interval(scores, rival, suite, metric, settings)
            limit = limits.get(rival) if suite == "eval" else None
            differences.append({"suite": suite, "against": rival, "metric": metric, "limit": limit,
                                "value": gain.value, "low": gain.low, "high": gain.high})  # fmt: skip
    return differences


def _true_label(slices: tuple[str, ...], predicted: str | None, correct: bool | None) -> str:
    """Return a row's true label: what was predicted where that is right, else the label among its slices."""
    # A score does not hold the row's answer. Where there are labels, the answer is the label slice.
    if correct:
        return str(predicted)
    return next((name.removeprefix("label=") for name in slices if name.startswith("label=")), "")


def _mcnemar_note(scores: Scores, rival: str, metric: Metric) -> str:
    """Return the exact p-value of McNemar's test in brackets; empty where the metric is not right or wrong."""
    if metric not in BINARY_METRICS:
        return ""
    pairs = comparable_pairs(scores, rival, "eval", metric)
    p = stats.mcnemar_p_value(
        [metric_value(a, metric) > 0 for a, _ in pairs],
        [metric_value(b, metric) > 0 for _, b in pairs],
        [a.prompt for a, _ in pairs],
    )
    return f" (exact McNemar p {p:.3g})"
