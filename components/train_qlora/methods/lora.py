"""LoRA: scale * B A is added to the frozen weight of a layer (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from torch import Tensor

from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm.adapter_scale import adapter_scale, default_alpha


class Lora:
    """The method, and the interface of the others.

    Attributes:
        config: The settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @property
    def alpha(self) -> float:
        """`train.alpha`; a plan has a number."""
        alpha = self.config.alpha
        return default_alpha(self.config.rank, self.config.method) if alpha is None else alpha

    def rate_factor(self, parameter_name: str) -> float:
        """Return what a parameter's learning rate is, as a multiple of `train.learning_rate`."""
        return 1.0

    def to_lora(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matrices A (rank, in) and B (out, rank) of a layer with delta W = B A, exactly.

        The scale goes into B. A power of two, such as the default scale 2, changes no digit of it.
        """
        return a, b * adapter_scale(self.config.rank, self.alpha, self.config.method)
