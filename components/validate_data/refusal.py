"""Say in one sentence why the data is refused, and what to set or correct; or that it is accepted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.validate_data.checks import NOT_BAD, explain_fault
from components.validate_data.gate_rows import GateRows
from components.validate_data.sizes import explain_too_few, explain_too_long
from qlora_retrain.config.data import DataConfig
from qlora_retrain.evaluation import drift

if TYPE_CHECKING:
    from components.validate_data.expectations import Finding

_DRIFT_CONFIDENCE = 0.95  # the confidence that the drift is more than chance
_MAX_EXPLAINED_REASONS = 3  # a refusal is one line of a log, so it stays short
_MAX_EVALUATED_FRACTION = 0.1  # of the training rows; where more were evaluated before, the split was another one
_SIZE_LIMITS = ("min_train_rows", "min_eval_prompts", "judge_fraction")
_SHARE_LIMITS = ("max_quarantined_fraction", "max_duplicates_fraction")


def explain_refusal(gate_rows: GateRows, findings: Sequence[Finding], config: DataConfig) -> str:
    """Return why the data is refused, with an example of each frequent reason; empty where it is accepted."""
    failed = [finding for finding in findings if finding.outcome == "refuse"]
    if not failed:
        return ""

    rows = [row for row in gate_rows.rows if row.reason != "not_kept"]
    bad_reasons = Counter(row.reason for row in rows if row.reason and row.reason not in NOT_BAD)
    # Where every row is bad, that alone breaks all limits.
    if bad_reasons.total() == len(rows):
        parts = [f"every row is bad ({len(rows):,} of {len(rows):,})"]
    else:
        parts = [describe_finding(finding) for finding in failed]
        parts += _size_advice(gate_rows, failed, config)

    reason_counts = bad_reasons.most_common(_MAX_EXPLAINED_REASONS)
    if any(finding.name == "max_duplicates_fraction" for finding in failed):
        reason_counts += [("exact_duplicate", sum(row.reason == "exact_duplicate" for row in rows))]
    for reason, count in reason_counts:
        first_row = next(row for row in rows if row.reason == reason)
        parts.append(f"{explain_fault(first_row, config)} ({reason}: {count:,} of {len(rows):,} rows)")
        if reason == "too_long":
            parts.append(explain_too_long(rows, config))
    if bad_reasons.total() < len(rows):
        parts += [_share_advice(finding) for finding in failed if finding.name in _SHARE_LIMITS]
    return "data refused: " + "; ".join(parts)


def compare_with_reference(
    profile: dict[str, Any], reference_profile: Path, config: DataConfig
) -> tuple[dict[str, Any] | None, str]:
    """Return the drift from the data of `data.reference_version`, and why it is too much; empty where it is not."""
    if not reference_profile.is_file():
        return None, f"data refused: version {config.reference_version} has no data profile to compare with"
    before = drift.read_distributions(reference_profile)
    prompts = drift.read_prompts(reference_profile), profile["prompts"]["train"] + profile["prompts"]["eval"]
    now, rows_before = profile["distributions"], drift.read_rows(reference_profile)
    drifts = None if before is None else drift.compute_drift(before, now, _DRIFT_CONFIDENCE, prompts)
    document = {
        "version": config.reference_version,
        "max_drift_psi": config.max_drift_psi,
        "rows_read": rows_before,
        "growth": round(profile["rows"]["read"] / rows_before, 6) if rows_before else None,
        "drift": drift.as_json(drifts or []),
        "labels": dict((before or {}).get("label", {})),
    }
    text, passed = drift.check_limit(drifts, config.max_drift_psi, f"the data of {config.reference_version}")
    return document, "" if passed else f"data refused: {text} (data.max_drift_psi)"


def explain_near_evaluation(num_rows: int) -> str:
    """Return what to do about so many training rows that nearly equal an evaluation or golden row."""
    return (
        f"{num_rows:,} rows were kept out of training, since they nearly equal an evaluation or golden row "
        "(near_evaluation); where rows share a document or a template, name its field in data.group_field, and where "
        "they differ by numbers on purpose, set data.checks: {near_evaluation: warn}"
    )


def explain_evaluated_before(num_rows: int, num_train: int) -> str:
    """Return how many rows were kept out since they were evaluated before, and what to do about very many."""
    text = (
        f"{num_rows:,} rows were kept out of training, since earlier runs of this line have evaluated their prompts "
        "(evaluated_before)"
    )
    if num_rows <= _MAX_EVALUATED_FRACTION * (num_train + num_rows):
        return text
    return (
        f"{text}; those runs split the data otherwise: set data.eval_fraction, data.split_seed, golden_data and "
        "eval_data as they were then, or begin anew with a line of another name, whose versions are not compared with "
        "those of this line"
    )


def explain_acceptance(profile: dict[str, Any], findings: Sequence[Finding]) -> str:
    """Return the sentence about accepted data, with the names of its warnings."""
    rows, prompts = profile["rows"], profile["prompts"]
    warnings = [finding.name for finding in findings if finding.outcome == "warn"]
    note = f"; {len(warnings)} warnings: {', '.join(warnings)}" if warnings else "; no warnings"
    sides = (
        f"{rows['train']:,} training rows and {rows['eval']:,} evaluation rows of {prompts['eval']:,} different prompts"
    )
    return f"accepted: {sides}, from {rows['read']:,} rows read{note}"


def describe_finding(finding: Finding) -> str:
    """Return what was observed, and which limit it is beyond."""
    observed = finding.observed or 0
    is_too_low = finding.low is not None and observed < finding.low
    limit = f"at least {finding.low:,.4g}" if is_too_low else f"at most {finding.high:,.4g}"
    return f"{finding.expectation}: {observed:,.4g}, expected {limit} ({finding.name})"


def _share_advice(finding: Finding) -> str:
    limit = math.ceil(round((finding.observed or 0) * 100, 6)) / 100
    return f"mend these rows, or leave them out with data.{finding.name}: {limit:g}"


def _size_advice(gate_rows: GateRows, failed: Sequence[Finding], config: DataConfig) -> list[str]:
    """Return what would give enough rows, where there are too few; first the rows that were kept out on purpose."""
    if not any(finding.name in _SIZE_LIMITS for finding in failed):
        return []

    if config.judge_fraction is not None:
        share = f"{config.judge_fraction:g} of the training prompts judge (--judge-fraction)"
        return [f"{share}; a larger share gives more prompts to judge by, a smaller one more rows to train on"]

    counts = Counter(row.reason for row in gate_rows.rows)
    parts = [
        f"{counts[reason]:,} rows were kept out, since {source} holds their conversations ({reason})"
        for reason, source in (("in_golden_set", "golden_data"), ("in_eval_data", "eval_data"))
        if counts[reason]
    ]
    if counts["evaluated_before"]:
        num_train = sum(row.split == "train" for row in gate_rows.rows)
        parts.append(explain_evaluated_before(counts["evaluated_before"], num_train))
    if counts["near_evaluation"]:
        parts.append(explain_near_evaluation(counts["near_evaluation"]))
        num_train = sum(row.split == "train" for row in gate_rows.rows)
        has_enough_prompts = not any(finding.name == "min_eval_prompts" for finding in failed)
        # With these rows there would be enough, so another split is no help.
        if has_enough_prompts and num_train + counts["near_evaluation"] >= config.min_train_rows:
            return parts
    if gate_rows.eval_fraction is not None:
        return [*parts, explain_too_few(gate_rows.fractions, config)]
    # With an evaluation file there is no split, so only more rows help.
    if any(finding.name == "min_eval_prompts" for finding in failed):
        parts.append("add rows to eval_data, or leave it out, so that the evaluation is a part of raw_data")
    return parts
