"""What a step hands back to its runner: the numbers it learned, and why it refused, if it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_retrain.core.errors import DataRefused, QualityRefused

Number = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Report:
    """A step's result beside its files.

    Attributes:
        numbers: What the manifest, the log's last line and the UI show; flat, units in the names.
        refused: The refusal, where the artifact is complete but says no.
    """

    numbers: Mapping[str, Number] = field(default_factory=dict)
    refused: DataRefused | QualityRefused | None = None
