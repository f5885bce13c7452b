"""Score base, its 4-bit form, challenger and champion on the same frozen rows, and decide by the rules.

Reads `dataset/{eval,golden}.jsonl`, `base_model`, `base_nf4`, `adapter`, and where there are any `champion` and
`reference_data`. Makes `evaluation/`: `evaluation.json`, `scores.jsonl`, `report.html`.
Refuses (11) a challenger that a rule fails, or that there is not enough evidence for.
Command: `python -m components.evaluate --plan URI`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from components.evaluate import page
from qlora_retrain import chat, modeling, progress, reference, scoring, verdict
from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.outcome import Number, Report
from qlora_retrain.scoring import RowScore

_SUITES = ("eval", "golden", "reference")


def run(
    config: EvaluateConfig,
    dataset: Path,
    base_model: Path,
    base_nf4: Path,
    adapter: Path,
    champion: Path | None,
    golden_data: Path | None,
    reference_data: Path | None,
    evaluation: Path,
) -> Report:
    """Evaluate; `golden_data` itself is not parsed, `dataset` holds its checked rows."""
    data = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    rows = [row for suite in ("eval", "golden") for row in scoring.read_rows(dataset / f"{suite}.jsonl", suite)]
    texts = reference.read(reference_data) if reference_data else []
    total = (4 if champion else 3) * (len(rows) + len(texts))
    scores: dict[str, list[RowScore]] = {}
    for name, folder, model, without_adapter in _contestants(config, base_model, base_nf4, adapter, champion):
        tokenizer = chat.load_tokenizer(folder)
        done = sum(len(found) for found in scores.values())
        how: dict[str, Any] = {"batch_tokens": config.batch_tokens, "what": "evaluating", "total": total}
        with without_adapter():
            found = scoring.score_rows(model, tokenizer, rows, labels=data["labels"], done=done, **how)
            found += scoring.score_texts(
                model, tokenizer, texts, done=done + len(rows), max_tokens=data["max_length_tokens"], **how
            )
        scores[name] = found
        progress.say(f"{name}: {len(found)} rows scored")
        del model
    judged = verdict.judge(scores, config)
    answers = {suite: {r.id: chat.answer_of(r.messages) for r in rows if r.suite == suite} for suite in _SUITES}
    measured = {suite: verdict.measure_suite(scores, suite, config, answers[suite]) for suite in _SUITES}
    scoring.write_scores(evaluation / "scores.jsonl", scores)
    _write(evaluation, config, judged, measured, verdict.metric_of(scores))
    challenger = [score for score in scores["challenger"] if score.suite == "eval"]
    html = page.write(judged, measured, challenger, answers["eval"])
    (evaluation / "report.html").write_text(html, encoding="utf-8")
    progress.say(judged.sentence)
    return judged.report(_numbers(measured["eval"]))


def _contestants(
    config: EvaluateConfig, base_model: Path, base_nf4: Path, adapter: Path, champion: Path | None
) -> Iterator[tuple[str, Path, Any, Callable[[], AbstractContextManager[Any]]]]:
    """(name, folder of its tokenizer, model, what to score it under), one in memory at a time.

    The 4-bit base and the challenger share one loaded model, with the adapter switched off and on.
    """
    where: dict[str, Any] = {"device": config.device, "attention": scoring.attention(config.device)}
    dtype = config.precision
    yield "base", base_model, modeling.load_base(base_model, dtype=dtype, **where), nullcontext
    gc.collect()
    packed = modeling.load_nf4(base_nf4, dtype=dtype, **where)
    shared = modeling.attach(packed, adapter)
    yield "base_nf4", base_nf4, shared, shared.disable_adapter
    yield "challenger", base_nf4, shared, nullcontext
    if champion:
        del packed, shared
        gc.collect()
        yield "champion", champion, modeling.load_base(champion, dtype=dtype, **where), nullcontext


def _write(
    evaluation: Path, config: EvaluateConfig, judged: verdict.Verdict, measured: dict[str, Any], metric: str
) -> None:
    document = {
        "verdict": judged.verdict,
        "sentence": judged.sentence,
        "metric": metric,
        "contestants": measured["eval"],
        **{suite: measured[suite] for suite in ("golden", "reference") if measured[suite]},
        "rules": judged.rules_as_json(),
        "settings": config.model_dump(mode="json"),
    }
    text = json.dumps(document, indent=2, allow_nan=False)
    (evaluation / "evaluation.json").write_text(text + "\n", encoding="utf-8")


def _numbers(measured: dict[str, dict[str, float | None]]) -> dict[str, Number]:
    numbers: dict[str, Number] = {"rows": max((int(n["rows"] or 0) for n in measured.values()), default=0)}
    for metric in ("accuracy", "loss"):
        numbers |= {f"{metric}_{name}": n[metric] for name, n in measured.items() if metric in n}
    return numbers
