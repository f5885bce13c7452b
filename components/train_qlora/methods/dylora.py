"""DyLoRA: each step trains another rank, so that every rank up to `train.rank` can be cut out afterwards.

Step by step a rank b is drawn, and the forward pass computes with the first b rows of A and columns of B at alpha / b
(Valipour et al., arXiv 2210.07558, sec. 4). Over a 4-bit base this is QDyLoRA (Rajabzadeh et al., arXiv 2402.10462).
"""

from __future__ import annotations

from typing import Any

import torch

from components.train_qlora.methods.lora import Lora, Matrices
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm.adapter_scale import adapter_scale

_DRAWS_PER_SEED = 2**31  # a run has fewer steps


class DyLora(Lora):
    """Between the steps, as for an evaluation, the whole rank computes.

    Attributes:
        step_rank: The rank of this step.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.step_rank = config.rank

    def scale(self, layer: Any) -> float:
        """Return alpha divided by the rank of this step."""
        return adapter_scale(self.step_rank, self.alpha, self.config.method)

    def begin_step(self, step: int, total_steps: int) -> None:
        """Draw a rank by the seed and the step alone, so that all processes and a resumed run draw the same."""
        generator = torch.Generator().manual_seed(self.config.seed * _DRAWS_PER_SEED + step)
        self.step_rank = int(torch.randint(1, self.config.rank + 1, (), generator=generator))

    def matrices(self, layer: Any) -> Matrices:
        """Return the first rows of A and columns of B; where `single` learns, all but the last are constants."""
        a, b = super().matrices(layer)
        rank = self.step_rank
        if self.config.dylora_update != "single":
            return a[:rank], b[:, :rank]
        last = rank - 1
        return torch.cat([a[:last].detach(), a[last:rank]]), torch.cat([b[:, :last].detach(), b[:, last:rank]], 1)

    def end_step(self, parameters: object) -> None:
        """Compute with the whole rank again."""
        self.step_rank = self.config.rank
