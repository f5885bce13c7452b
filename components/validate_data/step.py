"""Read, check, quarantine, de-duplicate and split the examples.

Reads `raw_data` (a folder of files), `base_model` (its tokenizer) and optional inputs: `golden_data`, `eval_data` (the
evaluation, instead of a part of `raw_data`), `reference_profile`, the data profile of the version that
`data.reference_version` names, `evaluation_history`, digests of the prompts that the line has evaluated before, and
`replay_data`, general examples that train beside the line's own; with it `reference_data`, whose text none may hold.
Makes `dataset`: train.jsonl, eval.jsonl, golden.jsonl, replay.jsonl, dataset.json, chat_format.json, profile.json,
quarantine.jsonl, evaluated_prompts.txt and report.html. The same input gives the same bytes.
Refuses (10) too many bad or repeated rows, too few good ones, and drift from that version's data.

Command: `python -m components.validate_data --plan URI`
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.validate_data import replay
from components.validate_data.checks import Row
from components.validate_data.encoding import dataset_chat_format
from components.validate_data.evaluated_before import read_history, write_evaluated
from components.validate_data.gate_rows import GateRows, read_gate_rows
from components.validate_data.profiling import build_profile
from components.validate_data.redaction import redacted_errors
from components.validate_data.refusal import (
    compare_with_reference,
    describe_finding,
    explain_acceptance,
    explain_evaluated_before,
    explain_near_evaluation,
    explain_refusal,
)
from components.validate_data.report import describe_row_warning, explain_evidence, report_page
from components.validate_data.shape import check_shape
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import graph, hashing, json_lines, progress
from qlora_retrain.core.errors import DataRefused
from qlora_retrain.core.outcome import Number, StepResult
from qlora_retrain.lm import conversations
from qlora_retrain.lm.chat import load_tokenizer
from qlora_retrain.lm.chat_format import ChatFormat

# Where more training rows than this nearly equal an evaluation row, the data has something that says why.
MAX_SIMILAR_FRACTION = 0.1


@redacted_errors()
def run(
    config: DataConfig,
    raw_data: Path,
    base_model: Path,
    golden_data: Path | None,
    reference_profile: Path | None,
    eval_data: Path | None,
    evaluation_history: Path | None,
    dataset: Path,
    replay_data: Path | None = None,
    reference_data: Path | None = None,
) -> StepResult:
    """Fill the folder `dataset`; the module's docstring says with what.

    Raises:
        UsageError: For a file that cannot be read, a bad golden or evaluation row, or a tokenizer that cannot be used.
    """
    tokenizer = load_tokenizer(base_model, ChatFormat.from_config(config))
    history = read_history(evaluation_history)
    gate_rows = read_gate_rows(config, tokenizer, raw_data, golden_data, eval_data, history, dataset, replay_data)
    chat_format = dataset_chat_format(tokenizer.chat_format, [*gate_rows.rows, *gate_rows.replay])

    # Not at the top: Great Expectations takes 160 MB, and comparing the rows before it takes the most memory.
    from components.validate_data.expectations import check_expectations

    findings = check_expectations(gate_rows.rows, config)
    profile = build_profile(gate_rows, config, findings, chat_format, tokenizer)
    # What was noticed in the files is logged where they are read.
    for note in profile["chat"]["notes"]:
        progress.say(note)
    for code, entry in profile["row_warnings"].items():
        progress.say(
            f"{entry['rows']:,} rows, the first {entry['first_rows'][0]}: {describe_row_warning(code)} ({code})"
        )

    num_train, num_similar = profile["rows"]["train"], profile["rows"]["near_evaluation"]
    if num_similar > MAX_SIMILAR_FRACTION * (num_train + num_similar):
        progress.say(explain_near_evaluation(num_similar))

    if num_evaluated := profile["rows"]["evaluated_before"]:
        progress.say(explain_evaluated_before(num_evaluated, num_train))

    # Said here, since it costs hours of training to learn it from the verdict.
    for text in explain_evidence(profile):
        progress.say(text)

    refusal = explain_refusal(gate_rows, findings, config)
    if replay_data:
        progress.say(replay.sentence(profile["replay"]))
        refusal = refusal or replay.explain_refusal(gate_rows.replay, reference_data, config)
    if reference_profile:
        path = reference_profile / graph.PROFILE_PATH
        profile["reference"], drift_refusal = compare_with_reference(profile, path, config)
        # Data that is refused anyway needs no second reason.
        refusal = refusal or drift_refusal

    for finding in (shape_findings := check_shape(profile["shape"], profile["reference"], config)):
        if finding.outcome == "warn":
            progress.say(describe_finding(finding))
    findings = [*findings, *shape_findings]
    profile["expectations"] += map(asdict, shape_findings)
    profile["data_pins"] = _hash_files(
        raw_data=raw_data, golden_data=golden_data, eval_data=eval_data, replay_data=replay_data
    )

    # Refused data is written too, since its report shows a person what to correct.
    sentence = refusal or explain_acceptance(profile, findings)
    _write_rows(dataset, gate_rows, config)
    chat_format.write(dataset)
    _write_json(dataset / "profile.json", profile)
    (dataset / "report.html").write_text(report_page(profile, sentence), encoding="utf-8")
    return StepResult(_numbers(profile, gate_rows), refused=DataRefused(refusal) if refusal else None)


def _hash_files(**folders: Path | None) -> dict[str, str]:
    """Return the sha256 of every file that was read, by its source and name, as the plan pins them."""
    return {
        f"{source}/{path.relative_to(folder).as_posix()}": hashing.sha256_file(path)
        for source, folder in folders.items()
        if folder
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _numbers(profile: dict[str, Any], gate_rows: GateRows) -> dict[str, Number]:
    """Return the numbers for the manifest; later runs of the line take the last three from a published version."""
    rows, labels, openings = profile["rows"], profile["labels"], gate_rows.shared_openings
    replay_numbers: dict[str, Number] = {"rows_replay": profile["replay"]["used"]} if profile["replay"] else {}
    return replay_numbers | {
        "rows_read": rows["read"],
        "rows_train": rows["train"],
        "rows_eval": rows["eval"],
        "rows_golden": rows["golden"],
        "rows_quarantined": rows["quarantined"],
        "duplicates": rows["duplicates"],
        "supervised_tokens_train": profile["train"]["supervised_tokens"],
        "labels": labels["different"] if labels else None,
        "eval_fraction": gate_rows.eval_fraction,
        "shared_openings": None if openings is None else " ".join(openings),
        "template_date": profile["chat"]["template_date"],
    }


def _write_rows(dataset: Path, gate_rows: GateRows, config: DataConfig) -> None:
    rows_by_split = gate_rows.by_split()
    for split, rows in rows_by_split.items():
        json_lines.write(dataset / f"{split}.jsonl", _records(rows))
    if gate_rows.replay:
        json_lines.write(dataset / "replay.jsonl", _records(replay.used(gate_rows.replay)))
    # No text is written: the file, the number and the hash are enough to find the row again.
    json_lines.write(
        dataset / "quarantine.jsonl",
        (
            {"file": r.file, "row": r.number, "reason": r.reason, "hash": r.hash}
            for r in (*gate_rows.rows, *gate_rows.replay)
            if r.reason
        ),
    )

    write_evaluated(dataset, [*rows_by_split["eval"], *rows_by_split["golden"]], config)

    labels: set[str] = set()
    if config.task == "labels":
        labels = {conversations.answer_of(row.messages) for rows in rows_by_split.values() for row in rows}
    document = {
        "task": config.task,
        "labels": sorted(labels) if config.task == "labels" else None,
        "system": config.system,
        "max_length_tokens": config.max_length_tokens,
        "eval_fraction": gate_rows.eval_fraction,
        "rows": {split: len(rows) for split, rows in rows_by_split.items()},
        "supervised_tokens": {
            split: sum(row.supervised_tokens for row in rows) for split, rows in rows_by_split.items()
        },
    }
    _write_json(dataset / "dataset.json", document)


def _records(rows: list[Row]) -> Iterator[dict[str, Any]]:
    row_ids: set[int] = set()
    for row in rows:
        messages, tools = row.chat_and_tools
        row_id = conversations.row_id(messages, tools)
        record = {"id": row_id, "prompt_id": row.prompt_id, "messages": messages}
        record |= {"tools": tools} if tools else {}
        yield record | ({"language": row.language} if row.language else {})
        row_ids.add(int(row_id, 16))

    # Scores and completions are looked up by id, so two rows of one id would be taken for each other.
    assert len(row_ids) == len(rows), "two rows have one id"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
