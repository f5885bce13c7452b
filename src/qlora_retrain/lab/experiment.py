"""A lab from beginning to end: check the grid, run its points, and write `lab.json` and `report.html`.

Reads a line and its sources. Makes ordinary artifacts in the line's store, and a folder with the report and the runs'
logs. Publishes nothing, moves no alias, and adds nothing to the line's evaluation history.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import qlora_retrain
from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.config.line import section_model
from qlora_retrain.core import graph
from qlora_retrain.core.errors import Exit, UsageError
from qlora_retrain.lab import grid, recommend, report, summary
from qlora_retrain.lab.grid import Grid
from qlora_retrain.lab.plans import LabPlanner, PointSettings
from qlora_retrain.lab.results import Candidate, read_result
from qlora_retrain.lab.runs import Job, Outcome, run_jobs
from qlora_retrain.lab.variations import NamedSettings, Variation
from qlora_retrain.pipeline.plan import Plan


@dataclass(frozen=True, slots=True)
class LabOptions:
    """What a lab is asked for.

    Attributes:
        config: The line's file.
        root: The store's URI.
        vary: The settings that are varied.
        named: Settings that belong together, each with a name.
        overrides: Settings of all points.
        num_seeds: Train every combination with the seeds 0, 1, ...; None: with the line's seed alone.
        skip_impossible: Leave out combinations that the line refuses.
        judge_fraction: The share of the training prompts to judge by.
        parallel: How many points run at once.
        has_merge: Merge every adapter too, and measure what that costs.
        out: The folder of the report; None: `lab-<line>` in the current folder.
    """

    config: Path
    root: str
    vary: tuple[Variation, ...]
    named: tuple[NamedSettings, ...] = ()
    overrides: tuple[str, ...] = ()
    num_seeds: int | None = None
    skip_impossible: bool = False
    judge_fraction: float = 0.1
    parallel: int = 1
    has_merge: bool = False
    out: Path | None = None


class NothingMeasured(Exception):
    """Every run failed, or the data that all share was refused; `code` is the exit code of that failure."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def run(options: LabOptions) -> tuple[dict[str, Any], Path]:
    """Run a lab; return the content of `lab.json` and the folder.

    Raises:
        UsageError: For settings that the line refuses, before anything runs.
        NothingMeasured: If there is no result at all.
        Interrupted: If somebody stopped it.
    """
    _refuse_unmeasured(options)
    planner = LabPlanner.for_line(
        options.config, options.root, options.overrides, options.judge_fraction, datetime.now(UTC)
    )
    points = grid.points_of(options.vary, options.num_seeds, options.named)
    built = grid.build_grid(points, planner.resolve, skip_impossible=options.skip_impossible)
    plans = planner.write([planner.plan(settings) for _, settings in built.points])

    out = options.out or Path(f"lab-{planner.draft.line}")
    out.mkdir(parents=True, exist_ok=True)
    labels = [point.run_label for point, _ in built.points]
    last_step = graph.producer_name("model" if options.has_merge else "evaluation")
    _make_shared(plans, options.parallel, out / "logs")
    outcomes = _run_points(labels, plans, last_step, options.parallel, out / "logs")

    document = _document(options, planner.draft.line, built, plans, outcomes)
    (out / "lab.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "report.html").write_text(report.render(document), encoding="utf-8")
    return document, out


def _refuse_unmeasured(options: LabOptions) -> None:
    merge = graph.step(graph.producer_name("model")).section
    varied = [("--vary", variation.knob) for variation in options.vary]
    varied += [("--points", knob) for named in options.named for knob, _ in named.settings]
    for option, knob in varied:
        if knob.startswith(f"{merge}.") and not options.has_merge:
            raise UsageError(f"{option} {knob}: changes nothing without --merge, which merges every adapter; add it")


def _make_shared(plans: Sequence[Plan], parallel: int, logs: Path) -> None:
    """Make what points share before they run side by side, so that nothing is made twice.

    Raises:
        NothingMeasured: If the data is refused, or cannot be read.
    """
    dataset = graph.producer_name("dataset")
    [outcome] = run_jobs([Job("data of all points", plans[0], dataset)], 1, logs)
    if outcome.code:
        raise NothingMeasured(outcome.code, outcome.message)
    if parallel > 1:
        base = graph.producer_name("base_nf4")
        by_key = {plan.step(base).key: plan for plan in plans}
        run_jobs([Job("4-bit base", plan, base) for plan in by_key.values()], 1, logs)


def _run_points(
    labels: Sequence[str], plans: Sequence[Plan], last_step: str, parallel: int, logs: Path
) -> list[Outcome]:
    """Run every point; those whose result has one key are one run."""
    jobs: dict[str, Job] = {}
    for label, plan in zip(labels, plans, strict=True):
        jobs.setdefault(plan.step(last_step).key, Job(label, plan, last_step, counts_refusal=True))
    outcomes = dict(zip(jobs, run_jobs(list(jobs.values()), parallel, logs), strict=True))
    return [outcomes[plan.step(last_step).key] for plan in plans]


def _document(
    options: LabOptions, line: str, built: Grid[PointSettings], plans: Sequence[Plan], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Collect the results and return the content of `lab.json`.

    Raises:
        NothingMeasured: If there are none.
    """
    settings = _evaluate_settings(plans[0])
    candidates: dict[str, Candidate] = {}
    failed: list[dict[str, Any]] = []
    for (point, _), plan, outcome in zip(built.points, plans, outcomes, strict=True):
        result = read_result(point, plan, settings)
        if result is not None and result.numbers["metric"] is not None:
            candidate = candidates.setdefault(point.label, Candidate(point.label, dict(point.all_settings)))
            candidate.results.append(result)
        if outcome.code:
            failed.append({"label": point.run_label, "exit_code": outcome.code, "message": outcome.message})
        elif result is None or result.numbers["metric"] is None:
            message = "the primary metric is defined for no row, or the loss is not finite"
            failed.append({"label": point.run_label, "exit_code": outcome.code, "message": message})
    if not candidates:
        code = next((outcome.code for outcome in outcomes if outcome.code), int(Exit.DIVERGED))
        raise NothingMeasured(code, f"no point was measured; {_failures(failed)}")

    metric = next(iter(candidates.values())).results[0].metric
    ranked = recommend.ranked(list(candidates.values()), metric, settings)
    return summary.summarise(
        _facts(options, line), ranked, recommend.recommend(ranked, metric, settings), metric, settings,
        failed=failed, skipped=list(grid.skipped(built)),
    )  # fmt: skip


def _evaluate_settings(plan: Plan) -> EvaluateConfig:
    step = graph.step(graph.producer_name("evaluation"))
    settings = section_model(step.section).model_validate(plan.step(step.name).config)
    assert isinstance(settings, EvaluateConfig)
    return settings


def _failures(failed: Sequence[dict[str, Any]]) -> str:
    return "; ".join(f"{entry['label']}: {entry['message']}" for entry in failed[:3])


def _facts(options: LabOptions, line: str) -> dict[str, Any]:
    return {
        "line": line,
        "version": qlora_retrain.__version__,
        "vary": {variation.knob: list(variation.values) for variation in options.vary},
        "named": {named.name: dict(named.settings) for named in options.named},
        "seeds": options.num_seeds,
        "judge_fraction": options.judge_fraction,
        "has_merge": options.has_merge,
    }
