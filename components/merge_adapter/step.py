"""Merge the adapter into a 16-bit model, and judge that form, the one that ships, by the same rules.

Reads `dataset/{eval,golden}.jsonl`, `base_model`, `base_nf4`, `adapter`, the scores of `evaluation`, and where there is
any `reference_data`.
Makes `model/`: a plain transformers folder in bf16, with `certificate.json` and `report.html`.
Refuses (11) a merged form that a rule fails, or that costs more than `merge.max_loss_nats` against the live model.
Command: `python -m components.merge_adapter --plan URI`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.merge_adapter import candidates, certificate, preflight
from components.merge_adapter.candidates import Bench, Measured
from components.merge_adapter.certificate import Certificate, Numbers
from qlora_retrain import chat, modeling, progress, reference, scoring, verdict
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.errors import IntegrityError
from qlora_retrain.outcome import Number, Report
from qlora_retrain.scoring import Row, RowScore

_SUITES = ("eval", "golden", "reference")


def run(
    config: MergeConfig,
    dataset: Path,
    base_model: Path,
    base_nf4: Path,
    adapter: Path,
    evaluation: Path,
    reference_data: Path | None,
    model: Path,
) -> Report:
    """Merge, choose the base, score what ships on the rows that were evaluated, and certify or refuse it."""
    data = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    rows = {suite: scoring.read_rows(dataset / f"{suite}.jsonl", suite) for suite in ("eval", "golden")}
    texts = reference.read(reference_data) if reference_data else []
    scores = scoring.read_scores(evaluation / "scores.jsonl")
    live = {suite: [s for s in scores["challenger"] if s.suite == suite] for suite in _SUITES}
    if any([row.id for row in found] != [s.id for s in live[suite]] for suite, found in rows.items()):
        raise IntegrityError("evaluation: its rows are not the data set's; it was made from another one")
    settings = _settings(evaluation)

    built = candidates.build(config, base_model, base_nf4, adapter, model)
    chosen_on, certified_on = _sides(config, rows["eval"])
    bench = Bench.of(config, settings, rows["eval"], certified_on, data["labels"], base_nf4, adapter)
    measured = candidates.measure(bench, built, model)
    winner = candidates.better(measured, chosen_on)
    candidates.keep(winner, model)
    progress.say(f"{winner}: {_why(config, measured, chosen_on, winner)}")

    shipped = {"eval": measured[winner].scores} | _rest(bench, settings, rows["golden"], texts, data, model)
    if [s.id for s in shipped["reference"]] != [s.id for s in live["reference"]]:
        raise IntegrityError("evaluation: its passages are not those of reference_data; it was made from other ones")
    sides = {"selection": chosen_on, "certification": certified_on}
    count = {side: len(ids) for side, ids in sides.items()}
    extra = certificate.enough(config, count)
    extra += certificate.rules(config, settings, _of(live["eval"], certified_on), measured[winner].on(certified_on))
    judged = verdict.judge({**scores, "challenger": [s for suite in _SUITES for s in shipped[suite]]}, settings, extra)
    answers = {row.id: chat.answer_of(row.messages) for found in rows.values() for row in found}
    every = {"live": Measured(live["eval"], [])} | measured
    certified = Certificate(
        base=winner,
        why=_why(config, measured, chosen_on, winner),
        judged=judged,
        cost=next(rule for rule in extra if rule.name == "merge_cost"),
        rows=count,
        forms={
            side: {name: certificate.numbers(form.on(ids), settings, answers) for name, form in every.items()}
            for side, ids in sides.items()
        },
        suites={
            suite: verdict.measure_suite({"live": live[suite], "merged": shipped[suite]}, suite, settings, answers)
            for suite in ("golden", "reference")
        },
        built=built[winner],
        serving=preflight.read(adapter),
    )
    _write(model, certified)
    progress.say(judged.sentence)
    return judged.report(_numbers(certified))


def _settings(evaluation: Path) -> EvaluateConfig:
    document = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    return EvaluateConfig.model_validate(document["settings"])


def _sides(config: MergeConfig, rows: Sequence[Row]) -> tuple[frozenset[str], frozenset[str]]:
    """The rows that choose and the rows that certify; where nothing is chosen, all certify."""
    return candidates.halves(rows) if config.base == "measured" else (frozenset(), frozenset(row.id for row in rows))


def _why(config: MergeConfig, measured: Mapping[str, Measured], chosen_on: frozenset[str], winner: str) -> str:
    if config.base != "measured":
        return f"merge.base says {winner}; nothing was chosen"
    losses = ", ".join(f"{name} {found.on(chosen_on).loss:.4f}" for name, found in measured.items())
    return f"the lower loss on the {len(chosen_on)} rows to choose on, in nats a token: {losses}"


def _rest(
    bench: Bench, settings: EvaluateConfig, golden: Sequence[Row], texts: Sequence[str], data: Any, model: Path
) -> dict[str, list[RowScore]]:
    """What ships, on the suites that chose nothing."""
    found: dict[str, list[RowScore]] = {"golden": [], "reference": []}
    if golden or texts:
        loaded, tokenizer = modeling.load_base(model, **bench.where), chat.load_tokenizer(model)
        how: dict[str, Any] = {"batch_tokens": settings.batch_tokens, "what": "scoring what ships"}
        how["total"] = len(golden) + len(texts)
        found["golden"] = scoring.score_rows(loaded, tokenizer, golden, labels=data["labels"], **how)
        most = data["max_length_tokens"]
        found["reference"] = scoring.score_texts(loaded, tokenizer, texts, max_tokens=most, done=len(golden), **how)
        del loaded
        gc.collect()
    return found


def _of(scores: Sequence[RowScore], ids: frozenset[str]) -> list[RowScore]:
    return [score for score in scores if score.id in ids]


def _write(model: Path, certified: Certificate) -> None:
    text = json.dumps(certified.as_json(), indent=2, allow_nan=False)
    (model / "certificate.json").write_text(text + "\n", encoding="utf-8")
    (model / "report.html").write_text(certified.page(), encoding="utf-8")


def _numbers(certified: Certificate) -> dict[str, Number]:
    """What the log's last line says, of the rows that certify."""
    forms: dict[str, Numbers] = certified.forms["certification"]
    merged = forms[certified.base]
    numbers: dict[str, Number] = {
        "base": certified.base,
        "rows": certified.rows["certification"],
        "merge_loss_nats": certified.cost.value,
        "kl_nats": merged.get("kl"),
        "agreement": merged.get("agreement"),
    }
    for metric in ("accuracy", "loss"):
        numbers |= {f"{metric}_{name}": found[metric] for name, found in forms.items() if metric in found}
    return numbers | {"modules": certified.built.modules, "weights_bytes": certified.built.weights_bytes}
