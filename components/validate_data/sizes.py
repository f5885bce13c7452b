"""Decide which fraction of the rows is evaluation, and say what would help where rows are too few or too long."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from components.validate_data.checks import Row
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

MIN_EVAL_FRACTION = 0.1  # `eval_fraction: auto` never takes less
_FRACTION_STEPS = 1_000_000  # fractions are written with this many steps
# `auto` takes up to this fraction of the rows for a margin over what is needed: a later file has other rows.
_MAX_MARGIN_FRACTION = 1 / 3
# The largest max_length_tokens that the config accepts.
_LONGEST_LIMIT = 131_072


def choose_fraction(fractions: Sequence[float], config: DataConfig) -> float:
    """Return the fraction below which a row's hash is evaluation.

    `auto` is at least 0.1, at least what the line's earlier version had, and at most half of the rows. Between these it
    is what `min_eval_prompts` needs, with a margin of two standard deviations where the prompts allow that.

    Args:
        fractions: The hashes of the good rows; those of one prompt are equal.
        config: The line's settings.
    """
    if config.eval_fraction != "auto":
        return config.eval_fraction

    total, needed = len(fractions), config.min_eval_prompts
    prompts: list[float] = np.unique(np.asarray(fractions, np.float64)).tolist()
    lowest = max(MIN_EVAL_FRACTION, config.min_eval_fraction or 0.0)
    if count_below(prompts, lowest) >= needed:
        return lowest

    # The smallest fraction that gives a number of prompts lies just above a prompt's hash.
    fractions = sorted(fractions)
    thresholds = [t for t in map(_just_above, prompts) if t > lowest]
    counts = [(threshold, count_below(fractions, threshold)) for threshold in thresholds]
    half, with_margin = total // 2, needed + math.ceil(2 * math.sqrt(needed))
    margin = min(with_margin, int(len(prompts) * _MAX_MARGIN_FRACTION))
    # Half of the rows may lie below a slightly larger number than 0.5, which is taken only where they are needed.
    for target, highest in ((max(margin, needed), 0.5), (needed, 1.0)):
        for threshold, count in counts:
            has_enough = count_below(prompts, threshold) >= target and total - count >= config.min_train_rows
            if has_enough and count <= half and threshold <= highest:
                return threshold
    # No fraction gives enough prompts: the largest that leaves half of them, and the gate refuses.
    return max([threshold for threshold, count in counts if count <= half and threshold <= 0.5], default=lowest)


def count_below(sorted_fractions: Sequence[float], eval_fraction: float) -> int:
    """Count the rows or prompts that are evaluation at a fraction."""
    return bisect.bisect_left(sorted_fractions, eval_fraction)


def explain_too_few(fractions: Sequence[float], config: DataConfig) -> str:
    """Return what would give enough on both sides of the split: a setting and its numbers, or more rows."""
    fractions, total, needed = sorted(fractions), len(fractions), config.min_eval_prompts
    prompts = sorted(set(fractions))
    auto = choose_fraction(fractions, config.model_copy(update={"eval_fraction": "auto"}))
    if config.eval_fraction != "auto" and _is_enough(fractions, auto, config):
        return _advice("data.eval_fraction: auto", fractions, auto)

    # Without a limit of a half.
    thresholds = map(_just_above, prompts)
    enough = next((t for t in thresholds if count_below(prompts, t) >= needed), None)
    if enough is not None and _is_enough(fractions, enough, config):
        return _advice(f"data.eval_fraction: {enough:g}", fractions, enough)

    least = needed + config.min_train_rows
    missing = max(least - total, needed - len(prompts))
    if missing > 0:
        text = (
            f"the data has {total:,} good rows of {len(prompts):,} different prompts, and min_eval_prompts "
            f"({needed:,}, as evaluate.min_prompts and merge.min_prompts need) and min_train_rows "
            f"({config.min_train_rows:,}) take {least:,} rows: add {missing:,} rows of other prompts"
        )
        if enough is not None and (left := total - count_below(fractions, enough)) > 0:
            settings = f"data.eval_fraction: {enough:g} and data.min_train_rows: {left}"
            text += f", or {_advice(settings, fractions, enough)}"
        return text

    # There are enough rows, but one conversation is too many of them.
    largest = Counter(fractions).most_common(1)[0][1]
    return (
        f"{largest:,} of {total:,} rows begin with one and the same user turn, and a conversation is never on both "
        "sides; name an evaluation file in sources.eval_data, or, where only later data began like this, set another "
        "data.split_seed, with which the split begins anew"
    )


def length_limits(rows: Sequence[Row], config: DataConfig) -> dict[str, int] | None:
    """Return the longest row, and the limit that keeps 95 % of the rows; None where no row is too long."""
    if not any(row.reason == "too_long" for row in rows):
        return None
    lengths = sorted(row.tokens for row in rows if row.tokens)
    # The nearest rank: at least 95 % of the rows are not longer.
    most = lengths[math.ceil(0.95 * len(lengths)) - 1]
    return {"limit": config.max_length_tokens, "keeps_95_percent": most, "longest": lengths[-1]}


def describe_length_limits(limits: Mapping[str, int]) -> str:
    """Return the longest row, and the settings that keep 95 % of the rows and all of them."""
    longest, most = limits["longest"], limits["keeps_95_percent"]
    text = f"the longest has {longest:,} tokens"
    if most > _LONGEST_LIMIT:
        return f"{text}, and no setting keeps 95 % of the rows; split the longest rows"
    settings = []
    if limits["limit"] < most < longest:
        settings.append(f"data.max_length_tokens: {most} keeps 95 % of the rows")
    if longest <= _LONGEST_LIMIT:
        settings.append(f"data.max_length_tokens: {longest} keeps all")
    return "; ".join([text, *([", ".join(settings)] if settings else [])])


def explain_too_long(rows: Sequence[Row], config: DataConfig) -> str:
    """Return the settings that keep rows which are too long; empty where none is."""
    limits = length_limits(rows, config)
    return describe_length_limits(limits) if limits else ""


def refuse_few_golden_rows(golden: Sequence[Row], config: DataConfig) -> None:
    """Refuse golden rows that are too few to decide anything, before hours of training and not after them.

    Raises:
        UsageError: If there are some, but of fewer prompts than the evaluation needs.
    """
    prompts = len({row.prompt_id for row in golden})
    if prompts < config.min_golden_prompts:
        raise UsageError(
            f"golden_data: {len(golden)} rows of {prompts} different prompts, and evaluate.min_golden_prompts needs "
            f"{config.min_golden_prompts}; add rows of other prompts, lower that setting, or leave golden_data out"
        )


def _just_above(fraction: float) -> float:
    """Return the smallest fraction of few digits that is above this one."""
    return (math.floor(fraction * _FRACTION_STEPS) + 1) / _FRACTION_STEPS


def _is_enough(fractions: Sequence[float], eval_fraction: float, config: DataConfig) -> bool:
    count = count_below(fractions, eval_fraction)
    prompts = count_below(sorted(set(fractions)), eval_fraction)
    return prompts >= config.min_eval_prompts and len(fractions) - count >= config.min_train_rows


def _advice(settings: str, fractions: Sequence[float], eval_fraction: float) -> str:
    count = count_below(fractions, eval_fraction)
    return f"{settings} would give {len(fractions) - count:,} training rows and {count:,} evaluation rows"
