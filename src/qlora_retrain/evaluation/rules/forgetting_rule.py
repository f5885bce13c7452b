"""Apply the limits on forgetting: what a model lost on reference text against the base.

Only the form that ships is judged, since `merge_adapter` may choose a weaker one than what was trained. Of any other
model it is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation.rules.comparison import (
    Metric,
    Scores,
    count_prompts_with_metric,
    display_name,
    gain_interval,
    rows_of_suite,
)
from qlora_retrain.evaluation.rules.rule_result import RuleResult, format_interval

# With 16 passages, at most 5 % of 2,000 simulated challengers that forgot exactly the limit pass by chance. The rates
# for 6, 12 and 16 passages are 5.8, 5.1 and 3.5 % where the losses of passages are exponentially distributed. They are
# 26, 7.8 and 4.1 % where one passage in five loses a quarter of its right tokens and the others lose none.
MIN_PASSAGES = 16
# At the interval's upper end. Of 18 passages that lies some 0.3 above the value, so what passes has about doubled the
# perplexity of general text, exp(0.7), at most. See ADR 42.
DEFAULT_MAX_NATS = 1.0


def apply(scores: Scores, settings: EvaluateConfig, *, is_final: bool) -> Iterator[RuleResult]:
    """Apply every limit on forgetting that the line has; report the same where the challenger is not what ships."""
    for metric, limit in limits(scores, settings).items():
        result = forgetting(scores, settings, metric, limit)
        # Too few passages are too few for the form that ships, too.
        yield result if is_final or result.passed is None else _reported(result)

    passages = len(rows_of_suite(scores["challenger"], "reference"))
    if settings.max_forgetting_nats == "auto" and passages and _count_passages(scores, "loss") < MIN_PASSAGES:
        text = (
            f"forgetting was not judged: reference text has {passages} passages, and at least {MIN_PASSAGES} are needed"
        )
        yield RuleResult("forgetting", text, passages, limit=MIN_PASSAGES, passed=True, is_measured=False)


def limits(scores: Scores, settings: EvaluateConfig) -> dict[Metric, float]:
    """Return the limits on forgetting, by metric; `auto` is one where there are passages enough to judge."""
    nats: float | str | None = settings.max_forgetting_nats
    if nats == "auto":
        nats = DEFAULT_MAX_NATS if _count_passages(scores, "loss") >= MIN_PASSAGES else None
    values = {"loss": nats, "token_accuracy": settings.max_forgetting_accuracy}
    return {metric: float(limit) for metric, limit in values.items() if limit is not None}


def forgetting(scores: Scores, settings: EvaluateConfig, metric: Metric, limit: float) -> RuleResult:
    """Check the loss on reference text against the base, in nats per token or in the share of right next tokens."""
    name = "forgetting" if metric == "loss" else "forgetting_accuracy"
    passages = _count_passages(scores, metric)
    if passages < MIN_PASSAGES:
        text = f"a limit on forgetting is set, but there are {passages} passages of reference text (chats with one "
        text += f"prompt count once) and at least {MIN_PASSAGES} are needed; set sources.reference_data to "
        text += "general text"
        return RuleResult(name, text, passages, limit=limit)

    # Compared with the base and not with the champion, because forgetting adds up from version to version.
    loss = gain_interval(scores, "base", "reference", metric, settings).negated
    text = f"{display_name(metric)} lost on reference text: {format_interval(loss)}; "
    text += f"its upper end must not lie above {limit:g}"
    return RuleResult.from_interval(name, text, loss, limit, loss.high <= limit)


def _reported(result: RuleResult) -> RuleResult:
    """Return the result as one that refuses nothing."""
    text = result.text.partition(";")[0].replace("reference text", "reference text by the unmerged model")
    text += f"; the form that ships is judged by the limit of {result.limit:g}, and merging may choose a weaker one"
    return replace(result, name=f"{result.name}_unmerged", text=text, limit=None, passed=True)


def _count_passages(scores: Scores, metric: Metric) -> int:
    return count_prompts_with_metric(scores, "reference", metric)
