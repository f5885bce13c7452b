"""A lab from beginning to end: check the grid, run its points, and write `lab.json` and `report.html`.

Reads a line and its sources. Makes ordinary artifacts in the line's store, and a folder with the report and the runs'
logs. Publishes nothing, moves no alias, and adds nothing to the line's evaluation history.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import qlora_retrain
from qlora_retrain.core import graph
from qlora_retrain.core.errors import Exit, UsageError
from qlora_retrain.lab import grid, recommend, report, search, summary, trials
from qlora_retrain.lab.options import LabOptions
from qlora_retrain.lab.planned import NothingMeasured, PlannedLab, make_shared
from qlora_retrain.lab.plans import LabPlanner
from qlora_retrain.lab.results import Candidate, evaluate_settings, read_result
from qlora_retrain.lab.runs import Job, Outcome, run_jobs


def run(options: LabOptions) -> tuple[dict[str, Any], Path]:
    """Run a lab; return the content of `lab.json` and the folder.

    Raises:
        UsageError: For settings that the line refuses, before anything runs.
        NothingMeasured: If there is no result at all.
        Interrupted: If somebody stopped it.
    """
    _refuse_unmeasured(options)
    planner = options.planner()
    out = options.out or Path(f"lab-{planner.draft.line}")
    _make_folder(out)
    if options.num_trials is not None:
        with search.exclusive(out):
            planned, outcomes = trials.run_trials(options, planner, out)
    else:
        planned = plan_points(options, planner)
        make_shared(planned, options.parallel, out / "logs")
        jobs = jobs_of(planned, options.last_step)
        ended = run_jobs(jobs, options.parallel, out / "logs")
        outcomes = {job.key: outcome for job, outcome in zip(jobs, ended, strict=True)}
    return report_on(options, planned, outcomes, out), out


def plan_points(options: LabOptions, planner: LabPlanner | None = None) -> PlannedLab:
    """Check every point, and write its plan.

    Raises:
        UsageError: For settings that the line refuses.
    """
    _refuse_unmeasured(options)
    planner = planner or options.planner()
    points = grid.points_of(options.vary, options.num_seeds, options.named)
    built = grid.build_grid(points, planner.resolve, skip_impossible=options.skip_impossible)
    plans = planner.write([planner.plan(settings) for _, settings in built.points])
    pairs = zip((point for point, _ in built.points), plans, strict=True)
    return PlannedLab(planner.draft.line, tuple(pairs), tuple(grid.skipped(built)))


def jobs_of(planned: PlannedLab, step: str) -> list[Job]:
    """Return the runs of a lab up to a step: those of points whose result has one key are one run."""
    labels = {plan.run_id: point.run_label for point, plan in reversed(planned.points)}
    return [Job(labels[plan.run_id], plan, step, counts_refusal=True) for plan in planned.distinct_plans(step)]


def report_on(options: LabOptions, planned: PlannedLab, outcomes: Mapping[str, Outcome], out: Path) -> dict[str, Any]:
    """Write `lab.json` and `report.html` of runs that have ended, and return the content of the first.

    Args:
        options: What was asked for.
        planned: The plans.
        outcomes: How the runs ended, by `Job.key`.
        out: The folder of the two files.

    Raises:
        NothingMeasured: If there is no result at all.
    """
    by_point = [outcomes[plan.step(options.last_step).key] for plan in planned.plans]
    document = _document(options, planned, by_point)
    (out / "lab.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "report.html").write_text(report.render(document), encoding="utf-8")
    return document


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {out}: cannot be made ({error.strerror}); name a folder, or one that does not exist yet"
        ) from error


def _refuse_unmeasured(options: LabOptions) -> None:
    merge = graph.step(graph.producer_name("model")).section
    varied = [("--vary", variation.knob) for variation in options.vary]
    varied += [("--points", knob) for named in options.named for knob, _ in named.settings]
    for option, knob in varied:
        if knob.startswith(f"{merge}.") and not options.has_merge:
            raise UsageError(f"{option} {knob}: changes nothing without --merge, which merges every adapter; add it")


def _document(options: LabOptions, planned: PlannedLab, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Collect the results and return the content of `lab.json`.

    Raises:
        NothingMeasured: If there are none.
    """
    settings = evaluate_settings(planned.plans[0])
    candidates: dict[str, Candidate] = {}
    failed: list[dict[str, Any]] = []
    for (point, plan), outcome in zip(planned.points, outcomes, strict=True):
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
        _facts(options, planned.line), ranked, recommend.recommend(ranked, metric, settings), metric, settings,
        failed=failed, skipped=planned.skipped,
    )  # fmt: skip


def _failures(failed: Sequence[dict[str, Any]]) -> str:
    return "; ".join(f"{entry['label']}: {entry['message']}" for entry in failed[:3])


def _facts(options: LabOptions, line: str) -> dict[str, Any]:
    return {
        "line": line,
        "version": qlora_retrain.__version__,
        "vary": {v.knob: [str(v.range)] if v.range else list(v.values) for v in options.vary},
        "named": {named.name: dict(named.settings) for named in options.named},
        "seeds": options.num_seeds,
        "judge_fraction": options.judge_fraction,
        "has_merge": options.has_merge,
    }
