"""LoRA: scale * B A is added to the frozen weight of a layer (Hu et al., arXiv 2106.09685).

The class is the interface of all methods whose update of a weight is a product of two matrices at each step. Their
parameters are those of PEFT's layers, and what `extend` adds to these under a name that begins with `lora_`: so
checkpoints, the optimizer and several processes know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from components.train_qlora.fused_lora import ADAPTER_NAME
from components.train_qlora.methods.method import Method
from qlora_retrain.lm.adapter_scale import adapter_scale, default_alpha, initial_rank

Matrices = tuple[Tensor, Tensor]


class Lora(Method):
    """The method, and the interface of the others with matrices.

    Attributes:
        has_magnitudes: Whether layers have a trained magnitude for each output, as PEFT's DoRA has.
    """

    has_magnitudes: ClassVar[bool] = False

    @property
    def rank(self) -> int:
        """The rank that layers start with."""
        return initial_rank(self.config.rank, self.config.method)

    @property
    def alpha(self) -> float:
        """`train.alpha`; a plan has a number."""
        alpha = self.config.alpha
        return default_alpha(self.config.rank, self.config.method) if alpha is None else alpha

    @property
    def scale(self) -> float:
        """What B A is multiplied by at this step."""
        return adapter_scale(self.config.rank, self.alpha, self.config.method)

    def extend(self, layer: Any) -> None:
        """Give an adapted layer the method's own parameters and start."""

    def matrices(self, layer: Any) -> Matrices:
        """Return A (rank, in) and B (out, rank) of a layer at this step, by which gradients reach its parameters."""
        return layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight

    def scale_output(self, layer: Any, output: Tensor) -> Tensor:
        """Return the output (..., out) of a layer as the method changes it, after B A was added."""
        return output

    def to_lora(self, tensors: Mapping[str, Tensor]) -> Matrices:
        """Return the matrices A (rank, in) and B (out, rank) of a layer with delta W = B A, exactly.

        The scale goes into B. A power of two, such as the default scale 2, changes no digit of it.

        Args:
            tensors: The layer's, by the names after `lora_`: `A`, `B`, and what `extend` added.
        """
        return tensors["A"], tensors["B"] * self.scale
