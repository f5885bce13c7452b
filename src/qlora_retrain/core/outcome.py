"""What a step's `run` returns: its numbers, and the refusal if its verdict is no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_retrain.core.errors import DataRefused, QualityRefused

# Flat values only: they go into the manifest, into one line of a log and into KFP's metrics.
Number = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's result, apart from its files.

    Attributes:
        numbers: Measurements for the manifest, the log's last line and the UI. They are flat, with units in the names.
        refused: The refusal, where the artifact is complete but its verdict is no; otherwise None.
    """

    numbers: Mapping[str, Number] = field(default_factory=dict)
    refused: DataRefused | QualityRefused | None = None
