"""Ask the planner's arithmetic what a training run needs: the same functions as those of `qlora-retrain plan`."""

from __future__ import annotations

from dataclasses import dataclass

from components.train_qlora.training_run import TrainingRun
from qlora_retrain.lm import base_formats, memory_model
from qlora_retrain.lm.memory_model import MicroBatch, Settings
from qlora_retrain.lm.model_shape import ModelShape, UnknownShape


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """The planner's arithmetic for micro-batches of a run's longest rows.

    Attributes:
        shape: The base's.
        settings: The line's.
        longest: The tokens of the longest row.
        max_rows: The most rows of a micro-batch.
    """

    shape: ModelShape
    settings: Settings
    longest: int
    max_rows: int

    @classmethod
    def from_run(cls, run: TrainingRun, max_rows: int) -> StepEstimate | None:
        """Read it from the loaded model; None for a family whose memory is not counted."""
        try:
            shape = ModelShape.from_config(run.model.config.to_dict())
        except UnknownShape:
            return None
        base_format = base_formats.from_model_config(run.model.config.to_dict(), "base_nf4")
        settings = Settings.from_train(run.config.model_dump(), base_format)
        return cls(shape, settings, max(run.rows.train.lengths), max_rows)

    def step_bytes(self, rows: int, tokens: int) -> int:
        """Return what forward and backward need beside the base, the adapter, its gradients and its optimizer."""
        parts = memory_model.estimate(self.shape, self.settings, MicroBatch(rows, self.longest, tokens))
        return parts.total - parts.static

    def rows_within(self, free_bytes: float) -> int:
        """Return the most rows of the longest kind whose step needs no more than this."""
        static = memory_model.estimate(self.shape, self.settings, MicroBatch(1, self.longest)).static
        return memory_model.largest_micro_batch(
            self.shape, self.settings, static + max(0, round(free_bytes)), self.longest, None, self.max_rows
        )
