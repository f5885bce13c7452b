"""LoRA: scale * B A is added to the frozen weight of a layer (Hu et al., arXiv 2106.09685).

The class is the interface of all methods whose update of a weight is a product of two matrices at each step. Their
parameters are those of PEFT's layers, and what `extend` adds to these under a name that begins with `lora_`: so
checkpoints, the optimizer and several processes know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from components.train_qlora import warm_start
from components.train_qlora.fused_lora import ADAPTER_NAME
from components.train_qlora.methods.method import Method
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.lm.adapter_scale import default_alpha, initial_rank

Matrices = warm_start.Matrices


class Lora(Method):
    """The method, and the interface of the others with matrices.

    Attributes:
        has_magnitudes: Whether layers have a trained magnitude for each output, as PEFT's DoRA has.
        needs_start: Whether the adapter starts from matrices that lie beside the base.
    """

    has_magnitudes: ClassVar[bool] = False
    needs_start: ClassVar[bool] = False

    @property
    def rank(self) -> int:
        """The rank that layers start with."""
        return initial_rank(self.config.rank, self.config.method)

    @property
    def alpha(self) -> float:
        """`train.alpha`; a plan has a number."""
        alpha = self.config.alpha
        return default_alpha(self.config.rank, self.config.method) if alpha is None else alpha

    def scale(self, layer: Any) -> float:
        """Return what B A of a layer is multiplied by at this step, by the layer's own rank and alpha."""
        scale: float = layer.scaling[ADAPTER_NAME]
        return scale

    def extend(self, layer: Any, start: Matrices | None) -> None:
        """Give an adapted layer the method's own parameters and start.

        Args:
            layer: The layer.
            start: What lies beside the base for it; where training goes on from an earlier adapter, that one's.
        """
        if start is not None:
            warm_start.fill(self.matrices(layer), start, self.scale(layer))

    def required(self, start: Matrices | None) -> Matrices:
        """Return the start of a layer.

        Raises:
            IntegrityError: If there is none, or one of another rank.
        """
        if start is None or len(start[0]) != self.rank:
            actual = "no start" if start is None else f"one of rank {len(start[0])}"
            raise IntegrityError(
                f"base_nf4: train.method: {self.config.method} needs a start of rank {self.rank} for every adapted "
                f"layer, and the base has {actual} for one of them; make a new plan"
            )
        return start

    def matrices(self, layer: Any) -> Matrices:
        """Return A (rank, in) and B (out, rank) of a layer at this step, by which gradients reach its parameters."""
        return layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight

    def scale_output(self, layer: Any, output: Tensor) -> Tensor:
        """Return the output (..., out) of a layer as the method changes it, after B A was added."""
        return output

    def to_lora(self, tensors: Mapping[str, Tensor], scale: float) -> Matrices:
        """Return the matrices A (rank, in) and B (out, rank) of a layer with delta W = B A, exactly.

        The scale goes into B. A power of two, such as the default scale 2, changes no digit of it.

        Args:
            tensors: The layer's, by the names after `lora_`: `A`, `B`, and what `extend` added.
            scale: That of the layer between the steps.
        """
        return tensors["A"], tensors["B"] * scale

    def beside(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a layer ships beside A and B, by the names after `lora_`."""
        return {}
