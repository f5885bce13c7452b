"""Run the trials of a search: what Optuna proposes is planned, run and told back, until there are enough."""

from __future__ import annotations

from pathlib import Path

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lab.grid import Point
from qlora_retrain.lab.options import LabOptions
from qlora_retrain.lab.planned import PlannedLab, make_shared
from qlora_retrain.lab.plans import LabPlanner
from qlora_retrain.lab.results import evaluate_settings, read_result
from qlora_retrain.lab.runs import Job, Outcome, run_jobs
from qlora_retrain.lab.search import Search, Trial
from qlora_retrain.pipeline.plan import Plan


def run_trials(options: LabOptions, planner: LabPlanner, out: Path) -> tuple[PlannedLab, dict[str, Outcome]]:
    """Run the trials that are left; return every point of the search, and how the runs ended by `Job.key`.

    Raises:
        UsageError: If Optuna is not installed, the folder has a search of other settings, or the line refuses all.
        NothingMeasured: If the data is refused.
        Interrupted: If somebody stopped it.
    """
    assert options.num_trials is not None
    search = Search(out, options.vary, options.named, options.parallel)
    planned: dict[str, tuple[Point, Plan]] = {}
    outcomes: dict[str, Outcome] = {}
    refused = search.refused_points()
    for point, outcome in search.ended_points():
        _note(point, _plan(planner, point), outcome, options, planned, outcomes)

    while search.num_ended < options.num_trials:
        trials = []
        for _ in range(min(options.parallel, options.num_trials - search.num_ended)):
            trial = search.propose()
            try:
                trials.append((trial, _plan(planner, trial.point)))
            except UsageError as error:
                refused[trial.point.label] = str(error)
                search.refuse(trial, str(error))
        for trial, plan, outcome in _run(options, planner, trials, out / "logs"):
            search.tell(trial, outcome, _value_to_minimize(trial.point, plan))
            _note(trial.point, plan, outcome, options, planned, outcomes)

    if not planned:
        label, reason = next(iter(refused.items()))
        raise UsageError(f"the line refuses every point that was tried; {label}: {reason}")
    return PlannedLab(planner.draft.line, tuple(planned.values()), tuple(sorted(refused.items()))), outcomes


def _plan(planner: LabPlanner, point: Point) -> Plan:
    [plan] = planner.write([planner.plan(planner.resolve(point))])
    return plan


def _run(
    options: LabOptions, planner: LabPlanner, trials: list[tuple[Trial, Plan]], logs: Path
) -> list[tuple[Trial, Plan, Outcome]]:
    """Run these trials side by side, each until its evaluation loss is behind the others'."""
    if not trials:
        return []
    make_shared(
        PlannedLab(planner.draft.line, tuple((t.point, plan) for t, plan in trials), ()), options.parallel, logs
    )
    jobs = [
        Job(t.point.run_label, plan, options.last_step, counts_refusal=True, is_hopeless=t.is_hopeless)
        for t, plan in trials
    ]
    ended = run_jobs(jobs, options.parallel, logs)
    return [(trial, plan, outcome) for (trial, plan), outcome in zip(trials, ended, strict=True)]


def _note(
    point: Point,
    plan: Plan,
    outcome: Outcome,
    options: LabOptions,
    planned: dict[str, tuple[Point, Plan]],
    outcomes: dict[str, Outcome],
) -> None:
    """Add a run, once where the same point was proposed twice."""
    planned.setdefault(plan.run_id, (point, plan))
    outcomes[plan.step(options.last_step).key] = outcome


def _value_to_minimize(point: Point, plan: Plan) -> float | None:
    """Return the loss, or any other metric negated; None where nothing was measured."""
    result = read_result(point, plan, evaluate_settings(plan))
    if result is None or result.numbers["metric"] is None:
        return None
    value: float = result.numbers["metric"]["value"]
    return value if result.metric == "loss" else -value
