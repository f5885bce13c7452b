"""What a lab is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qlora_retrain.core import graph
from qlora_retrain.lab.plans import LabPlanner
from qlora_retrain.lab.variations import NamedSettings, Variation


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
        num_trials: Search with so many trials, in place of every combination; None: no search.
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
    num_trials: int | None = None

    @property
    def last_step(self) -> str:
        """Return the last step of every point."""
        return graph.producer_name("model" if self.has_merge else "evaluation")

    def planner(self) -> LabPlanner:
        """Read the line and its sources, and return what makes the plans.

        Raises:
            UsageError: With every error of the line, or for a source or a store that cannot be used.
            IntegrityError: For an unsafe base model.
        """
        return LabPlanner.for_line(self.config, self.root, self.overrides, self.judge_fraction, datetime.now(UTC))
