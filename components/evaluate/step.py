"""Score base, its 4-bit form, challenger, champion and anchor on the same frozen rows, and decide by the rules.

Reads `dataset/{train,eval,golden}.jsonl`, `base_model`, `base_nf4`, `adapter`, and where there are any `champion`,
`anchor` and `reference_data`. Makes `evaluation/`: `evaluation.json`, `scores.jsonl`, `report.html`.
Refuses (11) a challenger that a rule fails, or that there is not enough evidence for.
Command: `python -m components.evaluate --plan URI`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components.evaluate import contestants, intruders, page
from components.evaluate.contestants import Folders
from components.evaluate.found import SUITES, Found, gap
from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core import graph, progress
from qlora_retrain.core.outcome import Number, Report
from qlora_retrain.evaluation import drift, reference_text, scoring, verdict
from qlora_retrain.evaluation.rows import Row
from qlora_retrain.evaluation.rules.rule import Rule
from qlora_retrain.lm import chat


def run(
    config: EvaluateConfig,
    dataset: Path,
    base_model: Path,
    base_nf4: Path,
    adapter: Path,
    champion: Path | None,
    anchor: Path | None,
    golden_data: Path | None,
    reference_data: Path | None,
    evaluation: Path,
) -> Report:
    """Evaluate; `golden_data` itself is not parsed, `dataset` holds its checked rows."""
    rows = [row for suite in ("eval", "golden") for row in scoring.read_rows(dataset / f"{suite}.jsonl", suite)]
    found = Found({suite: {r.id: chat.answer_of(r.messages) for r in rows if r.suite == suite} for suite in SUITES})
    _score(config, Folders(base_model, base_nf4, adapter, champion, anchor), dataset, rows, reference_data, found)
    found.drift = _drift(config, champion, dataset) if champion else None
    extra = [rule for rule in (_drift_rule(config, champion, found), found.gap_rule(config)) if rule]
    judged = verdict.judge(found.scores, config, extra)
    found.measure(config)
    scoring.write_scores(evaluation / "scores.jsonl", found.scores)
    text = json.dumps(found.document(config, judged), indent=2, allow_nan=False)
    (evaluation / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    golden = [row for row in rows if row.suite == "golden"] if config.text_in_reports else []
    (evaluation / "report.html").write_text(page.write(judged, found, config, golden), encoding="utf-8")
    progress.say(judged.sentence)
    return judged.report(_numbers(found.measured["eval"], config))


def _score(
    config: EvaluateConfig, folders: Folders, dataset: Path, rows: list[Row], reference_data: Path | None, found: Found
) -> None:
    """Fill in what every contestant makes of the rows, and what only the challenger is asked."""
    data = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    passages = reference_text.read(reference_data) if reference_data else []
    how: dict[str, Any] = {"what": "evaluating", "total": len(folders.names) * (len(rows) + len(passages))}
    for one in contestants.load(config, folders):
        tokenizer = chat.load_tokenizer(one.folder)
        done = sum(map(len, found.scores.values()))
        with one.under():
            scores, texts = scoring.score_by(
                config, one.model, tokenizer, rows, data["labels"], config.text_in_reports, done=done, **how
            )
            scores += scoring.score_texts(
                one.model, tokenizer, passages, done=done + len(rows), max_tokens=data["max_length_tokens"],
                batch_tokens=config.batch_tokens, **how,
            )  # fmt: skip
        found.scores[one.name], found.written[one.name] = scores, texts
        progress.say(f"{one.name}: {len(scores)} rows scored")
        if one.name == "challenger":
            found.layers = intruders.count(one.model, top=config.intruder_top, epsilon=config.intruder_epsilon)
            trained = _training_rows(dataset, config.train_rows)
            if trained:
                seen = scoring.score_rows(
                    one.model, tokenizer, trained, labels=None, last_answer_only=data["labels"] is not None,
                    batch_tokens=config.batch_tokens, what="training rows",
                )  # fmt: skip
                found.gap = gap([s for s in scores if s.suite == "eval"], seen, config)
        del one  # before the next one is loaded


def _training_rows(dataset: Path, most: int) -> list[Row]:
    """Some rows that the challenger was trained on, chosen by their hash."""
    path = dataset / "train.jsonl"
    return sorted(scoring.read_rows(path, "train"), key=lambda row: row.id)[:most] if most else []


def _drift(config: EvaluateConfig, champion: Path, dataset: Path) -> list[drift.Drift] | None:
    """How far the data is from what the champion learned; None where one of the two was not profiled for it."""
    before, now = champion / graph.PROFILE, dataset / "profile.json"
    if not before.is_file() or not now.is_file():
        return None
    old, new = drift.distributions(before), drift.distributions(now)
    return None if old is None or new is None else drift.measure(old, new, config.confidence)


def _drift_rule(config: EvaluateConfig, champion: Path | None, found: Found) -> Rule | None:
    if champion is None or config.max_drift is None:
        return None
    text, passed = drift.judge(found.drift, config.max_drift, "the champion's data")
    if not found.drift:
        return Rule("data_drift", text, limit=config.max_drift, passed=passed)
    return Rule("data_drift", text, found.drift[0].psi, found.drift[0].low, None, config.max_drift, passed)


def _numbers(measured: dict[str, dict[str, float | None]], config: EvaluateConfig) -> dict[str, Number]:
    numbers: dict[str, Number] = {"rows": max((int(n["rows"] or 0) for n in measured.values()), default=0)}
    for metric in dict.fromkeys(("accuracy", "loss", config.primary or "loss")):
        numbers |= {f"{metric}_{name}": n[metric] for name, n in measured.items() if metric in n}
    return numbers
