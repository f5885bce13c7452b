"""Read what the runs of a lab measured: from the manifests, the evaluations and the scores in the store."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.config.line import section_model
from qlora_retrain.core import graph, hashing
from qlora_retrain.evaluation import bootstrap
from qlora_retrain.evaluation.bootstrap import BootstrapSettings
from qlora_retrain.evaluation.rows import RowScore, read_scores
from qlora_retrain.evaluation.rules.comparison import Metric, gain_interval, has_metric, metric_interval
from qlora_retrain.evaluation.stats import Interval
from qlora_retrain.lab.grid import Point
from qlora_retrain.pipeline import status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, open_store
from qlora_retrain.storage.artifact import Manifest

_WEIGHTS = ".safetensors"
_CHALLENGER, _BASE, _SUITE = "challenger", "base", "eval"


@dataclass(frozen=True, slots=True)
class SeedResult:
    """What one run measured.

    Attributes:
        point: The point.
        numbers: What `lab.json` has of the run.
        scores: The adapter's scores on the rows that judge.
        base_scores: The scores of the base without the adapter.
        metric: The line's primary metric.
    """

    point: Point
    numbers: dict[str, Any]
    scores: list[RowScore]
    base_scores: list[RowScore]
    metric: Metric


@dataclass(slots=True)
class Candidate:
    """A combination of settings with the results of all its seeds.

    Attributes:
        label: The settings in words.
        settings: The settings by name.
        results: The results, in the order of the seeds.
    """

    label: str
    settings: dict[str, Any]
    results: list[SeedResult] = field(default_factory=list)

    @property
    def seeds(self) -> list[int | None]:
        """Return the seeds that were measured."""
        return [result.point.seed for result in self.results]

    def scores(self, seeds: Sequence[int | None]) -> list[RowScore]:
        """Return the scores of these seeds, one after the other."""
        by_seed = {result.point.seed: result.scores for result in self.results}
        return [score for seed in seeds for score in by_seed[seed]]

    def mean(self, name: str) -> float | None:
        """Return the mean of a number over the seeds; None where a seed lacks it."""
        values = [result.numbers[name] for result in self.results]
        return None if None in values else math.fsum(values) / len(values)


def read_result(point: Point, plan: Plan, settings: EvaluateConfig) -> SeedResult | None:
    """Return what a run measured; None where it was not evaluated."""
    manifests = {step.makes: status.find_manifest(plan, step.name) for step in graph.STEPS}
    adapter, evaluation = manifests["adapter"], manifests["evaluation"]
    if adapter is None or evaluation is None:
        return None
    document, scores = _read_evaluation(plan, evaluation)
    metric: Metric = document["metric"]
    rows = {name: [row for row in scores[name] if row.suite == _SUITE] for name in (_CHALLENGER, _BASE)}
    own_metric, own_loss = (
        value_interval(rows[_CHALLENGER], metric, settings),
        value_interval(rows[_CHALLENGER], "loss", settings),
    )
    intruders = document["intruder_dimensions"]
    numbers = {
        "seed": point.seed,
        "run": plan.run_id,
        "metric": interval_json(own_metric),
        "loss": interval_json(own_loss),
        "forgetting_nats": interval_json(_forgetting(scores, settings)),
        "intruder_dimensions": sum(layer["intruders"] for layer in intruders) if intruders else None,
        # With `train.method: full` they are all weights of the model, in several files where they are large.
        "adapter_bytes": sum(file.size_bytes for file in adapter.files if file.path.endswith(_WEIGHTS)),
        "peak_memory_mib": adapter.numbers["peak_gpu_mib"] or adapter.numbers["peak_rss_mib"],
        "training_seconds": _seconds(adapter),
        **{name: adapter.numbers[name] for name in ("trainable_parameters", "tokens_per_second", "steps")},
        "merge_loss_nats": _merge_loss(plan, manifests["model"]),
    }
    return SeedResult(point, numbers, rows[_CHALLENGER], rows[_BASE], metric)


def evaluate_settings(plan: Plan) -> EvaluateConfig:
    """Return the settings by which a plan evaluates."""
    step = graph.step(graph.producer_name("evaluation"))
    settings = section_model(step.section).model_validate(plan.step(step.name).config)
    assert isinstance(settings, EvaluateConfig)
    return settings


def value_interval(rows: Sequence[RowScore], metric: Metric, settings: EvaluateConfig) -> Interval | None:
    """Return a metric over rows with its interval by prompts; None where it is defined for none of them."""
    measured = [row for row in rows if has_metric(row, metric)]
    if not measured or not all(math.isfinite(row.loss_nats) for row in measured):
        return None
    if metric != "loss":
        return metric_interval(measured, metric, settings)
    losses, tokens = [row.loss_nats for row in measured], [row.tokens for row in measured]
    prompts = [row.prompt for row in measured]
    return bootstrap.ratio_interval(losses, tokens, BootstrapSettings.from_config(settings), prompts)


def interval_json(interval: Interval | None) -> dict[str, float] | None:
    """Return an interval as JSON has it."""
    return None if interval is None else {"value": interval.value, "low": interval.low, "high": interval.high}


def _read_evaluation(plan: Plan, manifest: Manifest) -> tuple[dict[str, Any], dict[str, list[RowScore]]]:
    """Return the content of `evaluation.json` and `scores.jsonl`.

    Raises:
        IntegrityError: If a file is not what the manifest says.
    """
    store, names = open_store(plan.root), ("evaluation.json", "scores.jsonl")
    hashes = {file.path: file.sha256 for file in manifest.files}
    with tempfile.TemporaryDirectory(prefix="qlora-retrain-lab-") as temporary:
        store.download(manifest.prefix, names, Path(temporary))
        for name in names:
            if hashing.sha256_file(Path(temporary) / name) != hashes[name]:
                raise artifact.corruption_error(store, manifest, f"{name}: its sha256 differs from the manifest's")
        document = json.loads((Path(temporary) / names[0]).read_text(encoding="utf-8"))
        return document, read_scores(Path(temporary) / names[1])


def _forgetting(scores: dict[str, list[RowScore]], settings: EvaluateConfig) -> Interval | None:
    """Return the loss per token on reference text minus the base's; None where the line has no reference text."""
    rows = [row for name in (_CHALLENGER, _BASE) for row in scores[name] if row.suite == "reference"]
    if not rows or not all(math.isfinite(row.loss_nats) and row.tokens for row in rows):
        return None
    return gain_interval(scores, _BASE, "reference", "loss", settings).negated


def _seconds(manifest: Manifest) -> float:
    """Return how long the attempt took that made an artifact; what earlier attempts did is not in it."""
    started, ended = (datetime.fromisoformat(manifest.provenance[name]) for name in ("started_at", "ended_at"))
    return (ended - started).total_seconds()


def _merge_loss(plan: Plan, manifest: Manifest | None) -> dict[str, float] | None:
    if manifest is None:
        return None
    data = open_store(plan.root).read(f"{manifest.prefix}/certificate.json").data
    loss: dict[str, float] | None = json.loads(data).get("merge_loss_nats")
    return loss
