"""Read, check, quarantine, de-duplicate and split the examples.

Reads `raw_data` (a folder of .jsonl, .csv or .parquet files), `base_model` (its tokenizer) and two optional inputs:
`golden_data`, and `reference_profile`, the data profile of the version that `data.reference_version` names.
Makes `dataset`: train.jsonl, eval.jsonl, golden.jsonl, dataset.json, profile.json, quarantine.jsonl and report.html.
The same input gives the same bytes.
Refuses (10) too many bad or repeated rows, too few good ones, and drift from that version's data.

Command: `python -m components.validate_data --plan URI`
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.validate_data.checks import NOT_BAD, Row, check_row, explain_fault, measure_lengths, special_token_texts
from components.validate_data.expectations import Finding, check_expectations
from components.validate_data.profiling import build_profile, report_page
from components.validate_data.raw_rows import read_rows
from components.validate_data.splitting import assign_splits, prompt_text, quarantine_repeats
from qlora_retrain.config.sections import DataConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import DataRefused, UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.evaluation import drift
from qlora_retrain.lm import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DRIFT_CONFIDENCE = 0.95  # the confidence that the drift is more than chance
_MAX_EXPLAINED_REASONS = 3  # a refusal is one line of a log, so it stays short


def run(
    config: DataConfig,
    raw_data: Path,
    base_model: Path,
    golden_data: Path | None,
    reference_profile: Path | None,
    dataset: Path,
) -> StepResult:
    """Fill the folder `dataset`; the module's docstring says with what.

    Raises:
        UsageError: For a file that cannot be read, a bad golden row, or a tokenizer that cannot be used.
    """
    # The golden rows are read first, since a row whose prompt is golden must not be trained on.
    tokenizer = chat.load_tokenizer(base_model)
    golden = _read_golden(golden_data, config, tokenizer) if golden_data else []
    rows = _read_checked(raw_data, "raw_data", config, tokenizer)
    quarantine_repeats(rows, config, {prompt_text(row) for row in golden})
    assign_splits(rows, config)

    findings = check_expectations(rows, config)
    profile = build_profile(rows, golden, config, findings)
    refusal = _refusal(rows, findings, config)
    # Data that is refused anyway needs no second reason.
    if reference_profile and not refusal:
        refusal = _drift_refusal(profile, reference_profile / graph.PROFILE_PATH, config)

    # Refused data is written too, since its report shows a person what to correct.
    sentence = refusal or _acceptance(profile, findings)
    rows_by_split = {split: [row for row in rows if row.split == split] for split in ("train", "eval")}
    _write_rows(dataset, rows, rows_by_split | {"golden": golden}, config)
    _write_json(dataset / "profile.json", profile)
    (dataset / "report.html").write_text(report_page(profile, sentence), encoding="utf-8")

    labels = profile["labels"]
    return StepResult(
        numbers={
            "rows_read": profile["rows"]["read"],
            "rows_train": profile["rows"]["train"],
            "rows_eval": profile["rows"]["eval"],
            "rows_golden": profile["rows"]["golden"],
            "rows_quarantined": profile["rows"]["quarantined"],
            "duplicates": profile["rows"]["duplicates"],
            "supervised_tokens_train": profile["train"]["supervised_tokens"],
            "labels": labels["different"] if labels else None,
        },
        refused=DataRefused(refusal) if refusal else None,
    )


def _read_checked(folder: Path, source: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    special_texts = special_token_texts(tokenizer)
    rows = [check_row(raw, config, special_texts) for raw in read_rows(folder, config, source)]
    measure_lengths(rows, config, tokenizer)
    return rows


def _read_golden(folder: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Return the golden rows. A bad one is an error, since a quarantined golden row would be missed by nobody."""
    rows = _read_checked(folder, "golden_data", config, tokenizer)
    quarantine_repeats(rows, config, ())
    bad_rows = [row for row in rows if row.reason]
    if bad_rows:
        fault = explain_fault(bad_rows[0], config)
        raise UsageError(f"golden_data: {fault} ({len(bad_rows)} of {len(rows)} rows to correct)")
    return rows


def _refusal(rows: Sequence[Row], findings: Sequence[Finding], config: DataConfig) -> str:
    """Return why the data is refused, with an example of each frequent reason; empty where it is accepted."""
    failed = [finding for finding in findings if finding.outcome == "refuse"]
    if not failed:
        return ""

    bad_reasons = Counter(row.reason for row in rows if row.reason and row.reason not in NOT_BAD)
    parts = []
    # Where every row is bad, that alone breaks all limits.
    if bad_reasons.total() == len(rows):
        parts.append(f"every row is bad ({len(rows):,} of {len(rows):,})")
    else:
        parts += [_failure(finding) for finding in failed]

    reason_counts = bad_reasons.most_common(_MAX_EXPLAINED_REASONS)
    if any(finding.name == "max_duplicates_fraction" for finding in failed):
        reason_counts += [("exact_duplicate", sum(row.reason == "exact_duplicate" for row in rows))]
    for reason, count in reason_counts:
        first_row = next(row for row in rows if row.reason == reason)
        parts.append(f"{explain_fault(first_row, config)} ({reason}: {count:,} of {len(rows):,} rows)")
    return "data refused: " + "; ".join(parts)


def _drift_refusal(profile: dict[str, Any], reference_profile: Path, config: DataConfig) -> str:
    """Return why the data differs too much from that of `data.reference_version`; empty where it does not."""
    if not reference_profile.is_file():
        return f"data refused: version {config.reference_version} has no data profile to compare with"
    before = drift.read_distributions(reference_profile)
    drifts = None if before is None else drift.compute_drift(before, profile["distributions"], _DRIFT_CONFIDENCE)
    text, passed = drift.check_limit(drifts, config.max_drift_psi, f"the data of {config.reference_version}")
    return "" if passed else f"data refused: {text} (data.max_drift_psi)"


def _failure(finding: Finding) -> str:
    observed = finding.observed or 0
    is_too_low = finding.low is not None and observed < finding.low
    limit = f"at least {finding.low:,.4g}" if is_too_low else f"at most {finding.high:,.4g}"
    return f"{finding.expectation}: {observed:,.4g}, expected {limit} ({finding.name})"


def _acceptance(profile: dict[str, Any], findings: Sequence[Finding]) -> str:
    rows = profile["rows"]
    warnings = [finding.expectation for finding in findings if finding.outcome == "warn"]
    note = f"; warnings: {', '.join(warnings)}" if warnings else ""
    return f"accepted: {rows['train']:,} training rows and {rows['eval']:,} evaluation rows of {rows['read']:,}{note}"


def _write_rows(dataset: Path, rows: Sequence[Row], rows_by_split: dict[str, list[Row]], config: DataConfig) -> None:
    for split, split_rows in rows_by_split.items():
        _write_lines(dataset / f"{split}.jsonl", map(_record, split_rows))
    # No text is written: the file, the number and the hash are enough to find the row again.
    _write_lines(
        dataset / "quarantine.jsonl",
        ({"file": r.file, "row": r.number, "reason": r.reason, "hash": r.hash} for r in rows if r.reason),
    )

    labels = sorted({chat.answer_of(row.messages) for split_rows in rows_by_split.values() for row in split_rows})
    _write_json(
        dataset / "dataset.json",
        {
            "task": config.task,
            "labels": labels if config.task == "labels" else None,
            "system": config.system,
            "max_length_tokens": config.max_length_tokens,
            "rows": {split: len(split_rows) for split, split_rows in rows_by_split.items()},
            "supervised_tokens": {
                split: sum(row.supervised_tokens for row in split_rows) for split, split_rows in rows_by_split.items()
            },
        },
    )


def _record(row: Row) -> dict[str, Any]:
    # The id names the prompt, so two answers to one prompt share it.
    language = {"language": row.language} if row.language else {}
    return {"id": chat.row_id(row.messages), "messages": row.messages, **language}


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    # newline="\n": the same bytes on every system.
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
