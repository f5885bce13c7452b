"""Read, check, quarantine, de-duplicate and split the examples.

Reads `raw_data` (a folder of .jsonl, .csv or .parquet files), `base_model` (its tokenizer) and, where there are any,
`golden_data` and `reference_profile`, the data profile of the version that `data.reference` names. Makes `dataset`:
train.jsonl, eval.jsonl, golden.jsonl, dataset.json, profile.json, quarantine.jsonl and report.html, the same bytes for
the same input. Refuses (10) too many bad or repeated rows, too few good ones, and drift from that version's data.
Command: `python -m components.validate_data --plan URI`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.validate_data.checks import NOT_BAD, Row, check, explain, measure, special_tokens
from components.validate_data.expectations import Finding, judge
from components.validate_data.profiling import page, profile
from components.validate_data.reading import read
from components.validate_data.splitting import prompt_text, quarantine_repeats, split
from qlora_retrain.config.sections import DataConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import DataRefused, UsageError
from qlora_retrain.core.outcome import Report
from qlora_retrain.evaluation import drift
from qlora_retrain.lm import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIDENCE = 0.95  # that drift is more than chance


def run(
    config: DataConfig,
    raw_data: Path,
    base_model: Path,
    golden_data: Path | None,
    reference_profile: Path | None,
    dataset: Path,
) -> Report:
    """Fill `dataset`; see the module.

    Raises:
        UsageError: For a file that cannot be read, a golden row that is not right, or a tokenizer that cannot be used.
    """
    tokenizer = chat.load_tokenizer(base_model)
    golden = _golden(golden_data, config, tokenizer) if golden_data else []
    rows = _checked(raw_data, "raw_data", config, tokenizer)
    quarantine_repeats(rows, config, {prompt_text(row) for row in golden})
    split(rows, config)
    findings = judge(rows, config)
    numbers = profile(rows, golden, config, findings)
    refusal = _refusal(rows, findings, config)
    if reference_profile and not refusal:
        refusal = _drifted(numbers, reference_profile / graph.PROFILE, config)
    sentence = refusal or _good_news(numbers, findings)
    sides = {side: [row for row in rows if row.split == side] for side in ("train", "eval")} | {"golden": golden}
    _write(dataset, rows, sides, config)
    _write_json(dataset / "profile.json", numbers)
    (dataset / "report.html").write_text(page(numbers, sentence), encoding="utf-8")
    labels = numbers["labels"]
    return Report(
        numbers={
            "rows_read": numbers["rows"]["read"],
            "rows_train": numbers["rows"]["train"],
            "rows_eval": numbers["rows"]["eval"],
            "rows_golden": numbers["rows"]["golden"],
            "rows_quarantined": numbers["rows"]["quarantined"],
            "duplicates": numbers["rows"]["duplicates"],
            "supervised_tokens_train": numbers["train"]["supervised_tokens"],
            "labels": labels["different"] if labels else None,
        },
        refused=DataRefused(refusal) if refusal else None,
    )


def _checked(folder: Path, source: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    specials = special_tokens(tokenizer)
    rows = [check(raw, config, specials) for raw in read(folder, config, source)]
    measure(rows, config, tokenizer)
    return rows


def _golden(folder: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The hand-kept rows; each must be right, since nobody looks at a number that silently counts fewer of them."""
    rows = _checked(folder, "golden_data", config, tokenizer)
    quarantine_repeats(rows, config, ())
    wrong = [row for row in rows if row.reason]
    if wrong:
        raise UsageError(f"golden_data: {explain(wrong[0], config)} ({len(wrong)} of {len(rows)} rows to correct)")
    return rows


def _refusal(rows: Sequence[Row], findings: Sequence[Finding], config: DataConfig) -> str:
    """Why the data is refused, on one line, with the first row of the most frequent reasons; empty where it is not."""
    failed = [finding for finding in findings if finding.outcome == "refuse"]
    if not failed:
        return ""
    bad = Counter(row.reason for row in rows if row.reason and row.reason not in NOT_BAD)
    parts = []
    if bad.total() == len(rows):
        parts.append(f"every row is bad ({len(rows):,} of {len(rows):,})")
    else:
        parts += [_failure(finding) for finding in failed]
    shown = bad.most_common(3)
    if any(finding.name == "max_duplicates" for finding in failed):
        shown += [("exact_duplicate", sum(row.reason == "exact_duplicate" for row in rows))]
    for reason, count in shown:
        first = next(row for row in rows if row.reason == reason)
        parts.append(f"{explain(first, config)} ({reason}: {count:,} of {len(rows):,} rows)")
    return "data refused: " + "; ".join(parts)


def _drifted(numbers: dict[str, Any], reference: Path, config: DataConfig) -> str:
    """Why the data is too unlike that of `data.reference`; empty where it is not."""
    if not reference.is_file():
        return f"data refused: version {config.reference} has no data profile to compare with"
    before = drift.distributions(reference)
    found = None if before is None else drift.measure(before, numbers["distributions"], _CONFIDENCE)
    text, passed = drift.judge(found, config.max_drift, f"the data of {config.reference}")
    return "" if passed else f"data refused: {text} (data.max_drift)"


def _failure(finding: Finding) -> str:
    observed = finding.observed or 0
    too_few = finding.low is not None and observed < finding.low
    wanted = f"at least {finding.low:,.4g}" if too_few else f"at most {finding.high:,.4g}"
    return f"{finding.expectation}: {observed:,.4g}, wanted {wanted} ({finding.name})"


def _good_news(numbers: dict[str, Any], findings: Sequence[Finding]) -> str:
    rows = numbers["rows"]
    warned = [finding.expectation for finding in findings if finding.outcome == "warn"]
    told = f"; look at: {', '.join(warned)}" if warned else ""
    return (
        f"accepted: {rows['train']:,} rows to train on and {rows['eval']:,} to evaluate, of {rows['read']:,} read{told}"
    )


def _write(dataset: Path, rows: Sequence[Row], sides: dict[str, list[Row]], config: DataConfig) -> None:
    for side, kept in sides.items():
        _write_lines(dataset / f"{side}.jsonl", map(_record, kept))
    _write_lines(
        dataset / "quarantine.jsonl",
        ({"file": r.file, "row": r.number, "reason": r.reason, "hash": r.hash} for r in rows if r.reason),
    )
    labels = sorted({chat.answer_of(row.messages) for kept in sides.values() for row in kept})
    _write_json(
        dataset / "dataset.json",
        {
            "task": config.task,
            "labels": labels if config.task == "labels" else None,
            "system": config.system,
            "max_length_tokens": config.max_length_tokens,
            "rows": {side: len(kept) for side, kept in sides.items()},
            "supervised_tokens": {side: sum(row.supervised_tokens for row in kept) for side, kept in sides.items()},
        },
    )


def _record(row: Row) -> dict[str, Any]:
    language = {"language": row.language} if row.language else {}
    return {"id": chat.row_id(row.messages), "messages": row.messages, **language}


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
