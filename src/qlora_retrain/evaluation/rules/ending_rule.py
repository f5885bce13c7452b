"""Apply the rule on answers that end by themselves, to the challenger and to every form that ships."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation.answer_endings import EMPTY, METRIC
from qlora_retrain.evaluation.rows import RowScore, count_prompts
from qlora_retrain.evaluation.rules.comparison import has_metric, metric_interval, rows_of_suite, share_interval
from qlora_retrain.evaluation.rules.rule_result import RuleResult
from qlora_retrain.evaluation.stats import Interval

# A label is a few tokens, after which nothing can follow. A text may honestly come near the limit of new tokens.
_DEFAULT_FLOORS = {"labels": 0.9, "text": 0.8}


def answers_end(rows: Sequence[RowScore], settings: EvaluateConfig, name: str = "answers_end") -> RuleResult:
    """Check that enough greedy answers end by themselves before the limit of new tokens.

    Like other floors, the rule uses the measured share. With fewer prompts than `min_prompts`, a share below the floor
    is a refusal only where it is certainly below; otherwise it is missing evidence. Without any row nothing was
    measured, which is shown and refuses nothing.

    Args:
        rows: The scores of one form of the model.
        settings: The limits.
        name: The rule's name.
    """
    measured = [row for row in rows_of_suite(rows, "eval") if has_metric(row, METRIC)]
    limit = settings.min_stopped_fraction
    if limit is None:
        # Only label tasks set `correct`.
        limit = _DEFAULT_FLOORS["labels" if any(row.correct is not None for row in rows) else "text"]
    if not measured:
        text = "whether answers end was not measured: " + (
            f"no evaluation row has a right answer of at most {settings.max_new_tokens} tokens; raise "
            "evaluate.max_new_tokens"
            if settings.stop_rows
            else "evaluate.stop_rows is 0"
        )
        return RuleResult(name, text, limit=limit, passed=True, is_measured=False)

    interval = metric_interval(measured, METRIC, settings)
    prompts = count_prompts(measured)
    text = describe(len(measured), prompts, interval, limit)
    # A model that says nothing ends at once, and must not pass for that.
    is_empty = [row.values.get(EMPTY) == 1.0 for row in measured]
    if any(is_empty):
        text += f"; empty ones, which the rule does not count: {sum(is_empty)}"
    ends = [row.values[METRIC] > 0 and not empty for row, empty in zip(measured, is_empty, strict=True)]
    share = share_interval(ends, [row.prompt for row in measured], settings)
    passed: bool | None = share.value >= limit
    if not passed and prompts < settings.min_prompts and share.high >= limit:
        passed = None
        text += f"; rows of {settings.min_prompts} different prompts whose right answer fits evaluate.max_new_tokens "
        text += "would decide"
    return RuleResult.from_interval(name, text, interval, limit, passed)


def describe(rows: int, prompts: int, interval: Interval, limit: float) -> str:
    """Say the share in words, e.g. `of 200 answers 198 ended by themselves (99 %; at least 90 %)`."""
    ended = round(interval.value * rows)
    number = f"{rows} answers" + (f" to {prompts} different prompts" if prompts < rows else "")
    return f"of {number} {ended} ended by themselves ({100 * interval.value:.3g} %; at least {100 * limit:.3g} %)"
