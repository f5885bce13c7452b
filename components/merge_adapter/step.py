"""Merge the adapter into a 16-bit model, and judge that form, the one that ships, by the same rules.

Reads `dataset/{eval,golden}.jsonl`, `base_model`, `base_nf4`, `adapter`, and the rivals' scores of `evaluation`.
Makes `model/`: a plain transformers folder in bf16, with `certificate.json` and `report.html`.
Refuses (11) a merged form that a rule fails, or that costs more than `merge.max_loss_nats` against the live model.
Command: `python -m components.merge_adapter --plan URI`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from components.merge_adapter.merge import Merged, merge
from qlora_retrain import chat, modeling, progress, report, scoring, verdict
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.errors import IntegrityError
from qlora_retrain.outcome import Number, Report
from qlora_retrain.scoring import RowScore
from qlora_retrain.verdict import Rule, Verdict


def run(
    config: MergeConfig,
    dataset: Path,
    base_model: Path,
    base_nf4: Path,
    adapter: Path,
    evaluation: Path,
    model: Path,
) -> Report:
    """Merge, score the result on the same rows, and certify or refuse it."""
    built = merge(
        base_model,
        base_nf4,
        adapter,
        model,
        dequantized=config.base == "dequantized",
        max_shard_gib=config.max_shard_gib,
    )
    progress.say(f"merged {built.modules} modules, {built.weights_bytes / 2**30:.2f} GiB")
    settings = _settings(evaluation)
    rows = [row for suite in ("eval", "golden") for row in scoring.read_rows(dataset / f"{suite}.jsonl", suite)]
    merged = _score(config, settings, dataset, rows, model)
    live = scoring.read_scores(evaluation / "scores.jsonl")
    if {(s.suite, s.id) for s in merged} != {(s.suite, s.id) for s in live["challenger"] if s.suite != "reference"}:
        raise IntegrityError("evaluation: its rows are not the data set's; it was made from another one")
    judged, cost = _judge(config, settings, live, merged)
    answers = {row.id: chat.answer_of(row.messages) for row in rows if row.suite == "eval"}
    measured = verdict.measure_suite({"live": live["challenger"], "merged": merged}, "eval", settings, answers)
    _certify(model, config, judged, cost, built, measured)
    progress.say(judged.sentence)
    numbers: dict[str, Number] = {"rows": len(answers), "merge_loss_nats": cost.value}
    for metric in ("accuracy", "loss"):
        numbers |= {f"{metric}_{name}": n[metric] for name, n in measured.items() if metric in n}
    return judged.report(numbers | {"modules": built.modules, "weights_bytes": built.weights_bytes})


def _settings(evaluation: Path) -> EvaluateConfig:
    document = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    return EvaluateConfig.model_validate(document["settings"])


def _score(
    config: MergeConfig, settings: EvaluateConfig, dataset: Path, rows: list[scoring.Row], model: Path
) -> list[RowScore]:
    labels = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))["labels"]
    loaded = modeling.load_base(
        model,
        device=config.device,
        attention=scoring.attention(config.device),
        dtype=config.precision,
    )
    scores, _ = scoring.score_by(settings, loaded, chat.load_tokenizer(model), rows, labels, what="scoring")
    return scores


def _judge(
    config: MergeConfig, settings: EvaluateConfig, live: dict[str, list[RowScore]], merged: list[RowScore]
) -> tuple[Verdict, Rule]:
    """The rules applied to the merged form, and what merging cost.

    This step reads no reference text, so what the live model forgot stands in for what the merged form did.
    """
    reference = [score for score in live["challenger"] if score.suite == "reference"]
    scores: dict[str, list[RowScore]] = {name: live[name] for name in ("base", "champion", "anchor") if name in live}
    scores["challenger"] = [*merged, *reference]
    cost = verdict.merge_cost(live["challenger"], merged, config.max_loss_nats, settings)
    return verdict.judge(scores, settings, extra=[cost]), cost


def _certify(
    model: Path,
    config: MergeConfig,
    judged: Verdict,
    cost: Rule,
    built: Merged,
    measured: dict[str, dict[str, float | None]],
) -> None:
    document = {
        "verdict": judged.verdict,
        "sentence": judged.sentence,
        "base": config.base,
        "merge_loss_nats": {"value": cost.value, "low": cost.low, "high": cost.high},
        "forms": measured,
        "rules": judged.rules_as_json(),
        "built": asdict(built),
    }
    text = json.dumps(document, indent=2, allow_nan=False)
    (model / "certificate.json").write_text(text + "\n", encoding="utf-8")
    html = report.page(
        f"Merged model: {judged.verdict}",
        judged.sentence,
        report.section("Rules", report.table(*verdict.rules_table(judged.rules))),
        report.section("The live model and its merged form", report.table(*verdict.numbers_table(measured))),
        report.section("What was built", report.numbers({"base": config.base, **asdict(built)})),
    )
    (model / "report.html").write_text(html, encoding="utf-8")
