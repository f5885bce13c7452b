"""The plans of a lab: ordinary plans of the line's store, under a name of their own, that publish nothing.

A lab's plan has the line's sources, its split and its evaluation history, and a share of the training rows to judge by
(`data.judge_fraction`). It names the line `LINE-lab`: what the line's own runs, versions and history are is untouched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora_retrain.config import line as line_config
from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.config.fields import Section
from qlora_retrain.config.line import section_model
from qlora_retrain.core import graph, hashing
from qlora_retrain.lab.grid import Point
from qlora_retrain.pipeline import base_model, make_plan
from qlora_retrain.pipeline.auto_settings import Choice, resolve_auto_settings
from qlora_retrain.pipeline.evaluation_history import EvaluationHistory
from qlora_retrain.pipeline.plan import Plan, plan_path, run_id, utc_stamp
from qlora_retrain.pipeline.plan_hold import write_plan
from qlora_retrain.pipeline.planned_steps import PinnedVersion, judgement_hash, plan_steps
from qlora_retrain.storage import keys, open_store, signatures
from qlora_retrain.storage.store import AlreadyExists, Store

_SUFFIX = "-lab"
# A line's name has at most 63 characters.
_MAX_LINE_CHARACTERS = 63 - len(_SUFFIX)
# Nothing ships, so a lab applies no limit; a gain over the base alone is asked for, which merging needs.
_WITHOUT_LIMITS: dict[str, Any] = {
    "allow_first_release": True,
    "min_prompts": 1,
    "min_gain_over_base": 0.0,
    "min_stopped_fraction": 0.0,
    "min_accuracy": None,
    "floors": {},
    "max_slice_regression": None,
    "slice_floor": None,
    "slice_floors": {},
    "max_forgetting_nats": None,
    "max_forgetting_accuracy": None,
    "max_train_eval_gap_nats": None,
    "text_in_reports": False,
}
# Every point scores the base, only for a note that says whether the adapter is any better. A line may ask for fewer.
_MAX_BASE_ROWS = 40
# The characters of a run's id that follow from its ids, and not from the time: a hyphen and 12 hex digits.
_TAIL_CHARACTERS = 13
Sections = Mapping[str, Section]


@dataclass(frozen=True, slots=True)
class PointSettings:
    """The resolved sections of a point, and the automatic choices among them."""

    sections: Sections
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class LabPlanner:
    """Makes the plans of a lab from one draft of the line's own plan, so that the sources are read once.

    Attributes:
        config: The line's file.
        overrides: What `--set` says of all points.
        store: The store.
        draft: The plan that the line would have now; it is not written.
        history: The line's evaluation history.
        judge_fraction: The share of the training prompts to judge by.
        at: The time of the plans.
    """

    config: Path
    overrides: tuple[str, ...]
    store: Store
    draft: Plan
    history: EvaluationHistory
    judge_fraction: float
    at: datetime

    @classmethod
    def for_line(
        cls, config: Path, root: str, overrides: Sequence[str], judge_fraction: float, at: datetime
    ) -> LabPlanner:
        """Read the line and its sources.

        Raises:
            UsageError: With every error of the line, or for a source or a store that cannot be used.
            IntegrityError: For an unsafe base model.
        """
        line, store = line_config.load(config, overrides), open_store(root)
        draft, history = make_plan.draft_plan(line, store, run_id(at, line.line, "lab"), at)
        return cls(config, tuple(overrides), store, draft, history, judge_fraction, at)

    def resolve(self, point: Point) -> PointSettings:
        """Return the settings of a point.

        Raises:
            UsageError: If the line refuses them, or its base cannot be trained with them.
        """
        config = line_config.load(self.config, [*self.overrides, *point.overrides])
        sections, choices = resolve_auto_settings(config)
        base_model.refuse_unfit_source(sections, self.draft.sources["base_model"])
        return PointSettings(sections, choices)

    def plan(self, settings: PointSettings) -> Plan:
        """Return the plan of a point, without writing it."""
        data, evaluate, publish = (_section_of(artifact) for artifact in ("dataset", "evaluation", "release"))
        sections = {
            **settings.sections,
            data: self._draft_section("dataset"),
            evaluate: self._draft_section("evaluation"),
        }
        evaluation = sections[evaluate]
        assert isinstance(evaluation, EvaluateConfig)
        changes = {
            data: {"judge_fraction": self.judge_fraction, "reference_version": None},
            evaluate: {**_WITHOUT_LIMITS, "base_rows": min(evaluation.base_rows or _MAX_BASE_ROWS, _MAX_BASE_ROWS)},
            # The champion has learnt the rows that judge here, so no run goes on from its adapter.
            _section_of("adapter"): {"start": "base"},
            publish: {"promote_to": None},
        }
        sections |= {name: sections[name].model_copy(update=values) for name, values in changes.items()}

        name = lab_line(self.draft.line)
        # No champion and no anchor: they were trained on the rows that judge here.
        versions: dict[str, PinnedVersion | None] = dict.fromkeys(graph.VERSION_PARTS)
        steps = plan_steps(sections, self.draft.sources, versions, self.draft.history, name, None)
        choices = [c for c in settings.choices if not c.field.startswith(f"{data}.")]
        choices += [c for c in self.draft.choices if c.field.startswith(f"{data}.")]
        # Points with the same settings have the same run, so that a lab that is begun again finds its plans.
        identity = hashing.sha256_json([[step.key, step.config] for step in steps])
        return Plan(
            run_id=run_id(self.at, name, "lab", identity),
            created_at=utc_stamp(self.at),
            root=self.store.uri,
            line=name,
            sources=self.draft.sources,
            champion=None,
            history=self.draft.history,
            target=None,
            judgement=judgement_hash(steps),
            unchanged=None,
            choices=tuple(choices),
            steps=steps,
        )

    def write(self, plans: Sequence[Plan]) -> list[Plan]:
        """Write the plans that the store does not have yet; return for each the one that is there."""
        runs = {run[-_TAIL_CHARACTERS:]: run for run in self.store.children("runs")}
        return [self._write(plan, runs.get(plan.run_id[-_TAIL_CHARACTERS:])) for plan in plans]

    def _write(self, plan: Plan, run: str | None) -> Plan:
        path = plan_path(run or plan.run_id)
        if run is not None and "plan.json" in self.store.children(f"runs/{run}"):
            return make_plan.find_plan(self.store, run)
        plan = signatures.sign(self.store, path, plan, keys.PLANNER)
        self.history.lend(self.store, self.draft.line, plan)
        with contextlib.suppress(AlreadyExists):  # a lab with the same arguments runs beside this one
            write_plan(self.store, plan)
        return Plan.of_run(self.store.uri, plan.run_id)

    def _draft_section(self, artifact: str) -> Section:
        config = self.draft.step(graph.producer_name(artifact)).config
        return section_model(_section_of(artifact)).model_validate(config)


def lab_line(line: str) -> str:
    """Return the name of the line in a lab's plans."""
    return f"{line[:_MAX_LINE_CHARACTERS].rstrip('-')}{_SUFFIX}"


def _section_of(artifact: str) -> str:
    return graph.step(graph.producer_name(artifact)).section
