"""Merge the adapter into a 16-bit model, and judge that form, the one that ships, by the same rules.

Reads `dataset/{eval,golden}.jsonl`, `base_model`, `base_nf4`, `adapter`, the scores of `evaluation`, and where there is
any `reference_data`. Makes `model/`: a plain transformers folder in bf16, with `certificate.json`, `report.html` and,
where the config asks for more forms, `exports/`.
Refuses (11) a merged form that a rule fails, or that costs more than `merge.max_loss_nats` against the live model.
Command: `python -m components.merge_adapter --plan URI`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.merge_adapter import candidates, certificate, exports, preflight
from components.merge_adapter.candidates import Bench, Measured
from components.merge_adapter.certificate import Certificate
from components.merge_adapter.exports import Export
from components.merge_adapter.merge import Merged
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.core.outcome import Number, Report
from qlora_retrain.evaluation import reference_text, scoring, verdict
from qlora_retrain.evaluation.rules import overall
from qlora_retrain.evaluation.scoring import Row, RowScore
from qlora_retrain.lm import chat, loading

_SUITES = ("eval", "golden", "reference")


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """What the live model was judged on, and how it did.

    Attributes:
        settings: Of the rules.
        labels: The closed set of answers, or None.
        rows: By suite: `eval` and `golden`.
        texts: The passages of the suite `reference`.
        max_tokens: Of a piece of a passage.
        scores: By contestant, as `evaluation` holds them.
    """

    settings: EvaluateConfig
    labels: list[str] | None
    rows: dict[str, list[Row]]
    texts: list[reference_text.Passage]
    max_tokens: int
    scores: dict[str, list[RowScore]]

    @classmethod
    def read(cls, dataset: Path, evaluation: Path, reference_data: Path | None) -> _Evaluated:
        """Read the three, which must belong together."""
        data = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
        document = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
        found = cls(
            settings=EvaluateConfig.model_validate(document["settings"]),
            labels=data["labels"],
            rows={suite: scoring.read_rows(dataset / f"{suite}.jsonl", suite) for suite in ("eval", "golden")},
            texts=reference_text.read(reference_data) if reference_data else [],
            max_tokens=data["max_length_tokens"],
            scores=scoring.read_scores(evaluation / "scores.jsonl"),
        )
        for suite, rows in found.rows.items():
            if [row.id for row in rows] != [score.id for score in found.live(suite)]:
                raise IntegrityError("evaluation: its rows are not the data set's; it was made from another one")
        return found

    def live(self, suite: str) -> list[RowScore]:
        """The live model's scores on a suite."""
        return [score for score in self.scores["challenger"] if score.suite == suite]

    @property
    def answers(self) -> dict[str, str]:
        """The true answer of each row id."""
        return {row.id: chat.answer_of(row.messages) for rows in self.rows.values() for row in rows}


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
    exports.check(config, base_model)
    given = _Evaluated.read(dataset, evaluation, reference_data)
    built = candidates.build(config, base_model, base_nf4, adapter, model)
    sides = _sides(config, given.rows["eval"])
    rows = given.rows["eval"], sides["certification"]
    bench = Bench.of(config, given.settings, *rows, given.labels, base_nf4, adapter)
    given = _computed_alike(config, given, bench, base_nf4)
    measured = candidates.measure(bench, built, model)
    winner = candidates.better(measured, sides["selection"])
    candidates.keep(winner, model)
    progress.say(_why(config, measured, sides["selection"], winner))
    rest = _rest(bench, given, model)
    more = exports.make(config, bench, base_model, base_nf4, adapter, model)
    certified = _certify(config, given, sides, measured, winner, built[winner], rest, more, preflight.read(adapter))
    text = json.dumps(certified.as_json(), indent=2, allow_nan=False)
    (model / "certificate.json").write_text(text + "\n", encoding="utf-8")
    (model / "report.html").write_text(certified.page(), encoding="utf-8")
    progress.say(certified.judged.sentence)
    numbers = _numbers(certified, given.settings)
    if certified.judged.verdict == "pass":
        # Told of the form that ships, which is what later versions are compared with, and not of the live model.
        numbers["best"] = overall.best(_shipped(given, measured[winner], rest), given.settings)
    return certified.judged.report(numbers)


def _shipped(given: _Evaluated, merged: Measured, rest: Mapping[str, list[RowScore]]) -> dict[str, list[RowScore]]:
    """Every contestant's scores, with the form that ships as the challenger."""
    suites = {"eval": merged.scores, **rest}
    return {**given.scores, "challenger": [score for suite in _SUITES for score in suites[suite]]}


def _computed_alike(config: MergeConfig, given: _Evaluated, bench: Bench, base_nf4: Path) -> _Evaluated:
    """The live model scored as the merged forms will be: again, where the evaluation computed in another precision.

    Else a part of what merging costs would be the precision's, as where a GPU evaluates and a CPU merges.
    """
    settings, rows = given.settings, given.rows["eval"]
    if (settings.device, settings.precision) == (config.device, config.precision):
        return given
    found = chat.load_tokenizer(base_nf4)
    scores, _ = scoring.score_by(settings, bench.live, found, rows, given.labels, what="scoring the live model again")
    others = [score for score in given.scores["challenger"] if score.suite != "eval"]
    return replace(given, scores={**given.scores, "challenger": [*scores, *others]})


def _sides(config: MergeConfig, rows: Sequence[Row]) -> dict[str, frozenset[str]]:
    """The rows that choose and the rows that certify; where nothing is chosen, all certify."""
    if config.base != "measured":
        return {"selection": frozenset(), "certification": frozenset(row.id for row in rows)}
    chosen_on, certified_on = candidates.halves(rows)
    return {"selection": chosen_on, "certification": certified_on}


def _why(config: MergeConfig, measured: Mapping[str, Measured], chosen_on: frozenset[str], winner: str) -> str:
    if config.base != "measured":
        return f"{winner}, as merge.base says; nothing was chosen"
    losses = ", ".join(f"{name} {found.on(chosen_on).loss:.4f}" for name, found in measured.items())
    return f"{winner}: the lower loss on the {len(chosen_on)} rows to choose on, in nats a token: {losses}"


def _rest(bench: Bench, given: _Evaluated, model: Path) -> dict[str, list[RowScore]]:
    """What ships, on the suites that chose nothing."""
    golden, texts = given.rows["golden"], given.texts
    found: dict[str, list[RowScore]] = {"golden": [], "reference": []}
    if golden or texts:
        loaded, tokenizer = loading.load_base(model, **bench.where), chat.load_tokenizer(model)
        how: dict[str, Any] = {"what": "scoring what ships", "total": len(golden) + len(texts)}
        found["golden"], _ = scoring.score_by(given.settings, loaded, tokenizer, golden, given.labels, **how)
        how |= {"done": len(golden), "max_tokens": given.max_tokens, "batch_tokens": given.settings.batch_tokens}
        found["reference"] = scoring.score_texts(loaded, tokenizer, texts, **how)
        del loaded
        gc.collect()
    if [score.id for score in found["reference"]] != [score.id for score in given.live("reference")]:
        raise IntegrityError("evaluation: its passages are not those of reference_data; it was made from other ones")
    return found


def _certify(
    config: MergeConfig,
    given: _Evaluated,
    sides: Mapping[str, frozenset[str]],
    measured: Mapping[str, Measured],
    winner: str,
    built: Merged,
    rest: Mapping[str, list[RowScore]],
    more: Mapping[str, Export],
    serving: list[str],
) -> Certificate:
    """Apply the rules of the evaluation to what ships, and the merge's own to what merging cost."""
    settings, answers = given.settings, given.answers
    count = {side: len(ids) for side, ids in sides.items()}
    live = [score for score in given.live("eval") if score.id in sides["certification"]]
    own = certificate.rules(config, settings, live, measured[winner].on(sides["certification"]))
    rules = [*certificate.enough(config, count), *own]
    ships = {"bf16": Export(".", built.weights_bytes, measured[winner].on(sides["certification"])), **more}
    listed: dict[str, dict[str, Any]] = {}
    for name, export in ships.items():
        numbers, limits = certificate.exported(config, settings, live, name, export.measured, answers)
        listed[name] = {"path": export.path, "size_bytes": export.size_bytes, **numbers}
        rules += limits if name != "bf16" else []  # whose rule is merge_cost
    forms = {"live": Measured(given.live("eval"), [])} | dict(measured)
    return Certificate(
        base=winner,
        why=_why(config, measured, sides["selection"], winner),
        judged=verdict.judge(_shipped(given, measured[winner], rest), settings, rules),
        cost=own[0],
        rows=count,
        forms={
            side: {name: certificate.numbers(form.on(ids), settings, answers) for name, form in forms.items()}
            for side, ids in sides.items()
        },
        suites={
            suite: verdict.measure_suite({"live": given.live(suite), "merged": rest[suite]}, suite, settings, answers)
            for suite in ("golden", "reference")
        },
        built=built,
        exports=listed,
        serving=serving,
    )


def _numbers(certified: Certificate, settings: EvaluateConfig) -> dict[str, Number]:
    """What the log's last line says, of the rows that certify."""
    forms = certified.forms["certification"]
    merged = forms[certified.base]
    numbers: dict[str, Number] = {
        "base": certified.base,
        "rows": certified.rows["certification"],
        "merge_loss_nats": certified.cost.value,
        "kl_nats": merged.get("kl"),
        "agreement": merged.get("agreement"),
    }
    for metric in dict.fromkeys(("accuracy", "loss", settings.primary or "loss")):
        numbers |= {f"{metric}_{name}": found[metric] for name, found in forms.items() if metric in found}
    numbers |= {f"loss_{name}": found.get("loss") for name, found in certified.exports.items() if name != "bf16"}
    return numbers | {"modules": certified.built.modules, "weights_bytes": certified.built.weights_bytes}
