"""A lab that is planned: its points with their plans; as JSON too, since tasks of Airflow may be on other machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_retrain.core import graph
from qlora_retrain.lab.grid import Point
from qlora_retrain.lab.runs import Job, run_jobs
from qlora_retrain.lab.variations import NamedSettings
from qlora_retrain.pipeline.plan import Plan


@dataclass(frozen=True, slots=True)
class PlannedLab:
    """The plans of a lab.

    Attributes:
        line: The line.
        points: Each point with its plan.
        skipped: The label of each combination that the line refuses, with the reason.
    """

    line: str
    points: tuple[tuple[Point, Plan], ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def plans(self) -> list[Plan]:
        """The plans, in the order of the points."""
        return [plan for _, plan in self.points]

    def distinct_plans(self, step: str) -> list[Plan]:
        """Return a plan for each artifact that a step makes, in the order of the points: the first one of each."""
        first: dict[str, Plan] = {}
        for plan in self.plans:
            first.setdefault(plan.step(step).key, plan)
        return list(first.values())

    def as_json(self) -> dict[str, Any]:
        """Return a document from which `from_json` makes the same lab."""
        points = [
            {
                "settings": [list(setting) for setting in point.settings],
                "seed": point.seed,
                "named": None
                if point.named is None
                else {"name": point.named.name, "settings": [list(setting) for setting in point.named.settings]},
                "plan": plan.uri,
            }
            for point, plan in self.points
        ]
        return {"line": self.line, "points": points, "skipped": [list(pair) for pair in self.skipped]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> PlannedLab:
        """Read what `as_json` returned.

        Raises:
            UsageError: If a plan is not there.
            IntegrityError: If a plan is another one than it was.
        """
        points = tuple((_point(entry), Plan.load(entry["plan"])) for entry in document["points"])
        return cls(document["line"], points, tuple((label, reason) for label, reason in document["skipped"]))


class NothingMeasured(Exception):
    """Every run failed, or the data that all share was refused; `code` is the exit code of that failure."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def make_shared(planned: PlannedLab, parallel: int, logs: Path) -> None:
    """Make what points share before they run side by side, so that nothing is made twice.

    Raises:
        NothingMeasured: If the data is refused, or cannot be read.
    """
    dataset = graph.producer_name("dataset")
    [outcome] = run_jobs([Job("data of all points", planned.plans[0], dataset)], 1, logs)
    if outcome.code:
        raise NothingMeasured(outcome.code, outcome.message)
    if parallel > 1:
        base = graph.producer_name("base_nf4")
        run_jobs([Job("base in its format", plan, base) for plan in planned.distinct_plans(base)], 1, logs)


def _point(entry: Mapping[str, Any]) -> Point:
    named = entry["named"]
    return Point(
        _settings(entry["settings"]),
        entry["seed"],
        NamedSettings(named["name"], _settings(named["settings"])) if named else None,
    )


def _settings(pairs: list[list[Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple((knob, value) for knob, value in pairs)
