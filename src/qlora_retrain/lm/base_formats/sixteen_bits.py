"""`quantize.format: none`: the base in 16 bits, as plain LoRA and full fine-tuning need it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qlora_retrain.lm.base_formats.base_format import BaseFormat, StorageBits

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Linear
    from transformers import PreTrainedModel

    from qlora_retrain.lm.weight_files import SafetensorsFolder, TensorSpec


@dataclass(frozen=True, slots=True)
class SixteenBits(BaseFormat):
    """Every tensor has the name that it has in the base's files; floating-point ones are bf16 or fp16."""

    is_packed: ClassVar[bool] = False
    scratch_bytes_per_weight: ClassVar[int] = 0

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """There is nothing to set but the type, and that is in the tensors."""
        return cls()

    @property
    def bits_per_weight(self) -> float:
        """16, of which none are scales."""
        return 16.0

    def storage(self, specs: Mapping[str, TensorSpec]) -> StorageBits:
        """Count every matrix of floating-point numbers, embeddings too, since all are stored alike."""
        matrices = [spec for spec in specs.values() if spec.dtype.is_floating_point and len(spec.shape) > 1]
        weights = sum(math.prod(spec.shape) for spec in matrices)
        bits = 8 * sum(spec.size_bytes for spec in matrices) / weights if weights else 0.0
        return StorageBits(weights, bits, bits)

    def packed_names(self, names: Iterable[str]) -> set[str]:
        """No weight is packed."""
        return set()

    def unpack(self, name: str, tensors: SafetensorsFolder) -> Tensor:
        """Return the tensor as it is stored."""
        return tensors.tensor(name)

    @staticmethod
    def is_packed_layer(layer: Any) -> bool:
        """No layer is packed."""
        return False

    @staticmethod
    def layer_weight(layer: Any) -> Tensor:
        """Return the layer's own parameter."""
        weight: Tensor = layer.weight
        return weight

    def layer_type(self) -> type[Linear]:
        """Return the class of all linear layers."""
        from torch.nn import Linear

        layer_type: type[Linear] = Linear
        return layer_type

    def transformers_config(self) -> None:
        """Nothing is packed."""
        return

    def load(self, from_pretrained: Callable[[str], PreTrainedModel], *, is_float32: bool) -> PreTrainedModel:
        """Load the weights in the type in which they are stored, or widened to float32."""
        return from_pretrained("float32" if is_float32 else "auto")
