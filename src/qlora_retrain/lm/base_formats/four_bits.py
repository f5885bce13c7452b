"""`quantize.format: nf4` and `fp4`: bitsandbytes' 4 bits, in blocks of 64 weights (QLoRA, arXiv 2305.14314, sec. 3).

A weight's code is one of 16 levels, times the scale of its block. With double quantization the scales have 8 bits, and
256 of them share a scale of 32 bits. `four_bit` packs one tensor, `streaming_quantizer` a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qlora_retrain.lm import dequantize
from qlora_retrain.lm.base_formats.base_format import BaseFormat, StorageBits
from qlora_retrain.lm.four_bit import BLOCK_SIZE, SCALES_PER_GROUP

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Linear
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from qlora_retrain.lm.weight_files import SafetensorsFolder, TensorSpec

# What bitsandbytes stores beside the codes of a weight, by what the name has after the weight's. The nested ones exist
# with double quantization. The tables are the levels of both codes, and a small JSON with shapes and the scales' mean.
_SCALES = ("absmax", "nested_absmax")
_STATE = "quant_state.bitsandbytes__"
_TABLES = ("quant_map", "nested_quant_map", f"{_STATE}nf4", f"{_STATE}fp4")


@dataclass(frozen=True, slots=True)
class FourBits(BaseFormat):
    """4 bits by bitsandbytes.

    Attributes:
        quant_type: `nf4` or `fp4`.
        double_quant: Whether the scales are quantized too.
        compute_dtype: The type to which weights are dequantized, and of what is not packed.
    """

    is_packed: ClassVar[bool] = True
    scratch_bytes_per_weight: ClassVar[int] = 2
    quant_type: str
    double_quant: bool
    compute_dtype: str

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Take the values of the section `quantize`."""
        return cls(settings["format"], settings["double_quant"], settings["compute_dtype"])

    @property
    def bits_per_weight(self) -> float:
        """4.127 with double quantization, 4.5 without."""
        scale_bits = 8 + 32 / SCALES_PER_GROUP if self.double_quant else 32
        return 4 + scale_bits / BLOCK_SIZE

    @property
    def code_bits_per_weight(self) -> float:
        """4, one of 16 levels."""
        return 4.0

    def storage(self, specs: Mapping[str, TensorSpec]) -> StorageBits:
        """Add up the bytes of every tensor that belongs to a packed weight."""

        def size_bytes(name: str, parts: Iterable[str]) -> int:
            return sum(specs[f"{name}.{part}"].size_bytes for part in parts if f"{name}.{part}" in specs)

        names = self.packed_names(specs)
        weights = sum(2 * specs[name].size_bytes for name in names)  # two codes per byte
        if not weights:
            return StorageBits(0, 0.0, 0.0)
        growing_bytes = weights // 2 + sum(size_bytes(name, _SCALES) for name in names)
        table_bytes = sum(size_bytes(name, _TABLES) for name in names)
        return StorageBits(weights, 8 * growing_bytes / weights, 8 * (growing_bytes + table_bytes) / weights)

    def packed_names(self, names: Iterable[str]) -> set[str]:
        """Return the weights that have a quantization state."""
        state = f".{_STATE}{self.quant_type}"
        return {name.removesuffix(state) for name in names if name.endswith(state)}

    def unpack(self, name: str, tensors: SafetensorsFolder) -> Tensor:
        """Return the values of a weight, computed on the CPU, so that they do not depend on the machine."""
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # Which of these exist depends on the type and on double quantization; bitsandbytes needs those that exist.
        keys = [f"{name}.{part}" for part in (*_SCALES, *_TABLES)]
        parts = {key: tensors.tensor(key) for key in keys if key in tensors}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        weight: Tensor = dequantize_4bit(tensors.tensor(name), state)
        return weight

    @staticmethod
    def is_packed_layer(layer: Any) -> bool:
        """Return whether the layer has a quantization state."""
        return (getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)) is not None

    @staticmethod
    def layer_weight(layer: Any) -> Tensor:
        """Return the values of a layer's weight, in the precision for which it was quantized."""
        from bitsandbytes.functional import dequantize_4bit

        # With FSDP, a gathered weight is a plain tensor without a quantization state, but its layer still has it.
        state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
        weight: Tensor = dequantize_4bit(layer.weight.data, state)
        return weight

    def layer_type(self) -> type[Linear]:
        """Return bitsandbytes' class."""
        from bitsandbytes.nn import Linear4bit

        layer_type: type[Linear] = Linear4bit
        return layer_type

    def load(self, from_pretrained: Callable[[str], PreTrainedModel], *, is_float32: bool) -> PreTrainedModel:
        """Load the weights packed, or unpack them once: the same values at 8 times the memory."""
        # "auto" is the precision in config.json, for which the weights were quantized.
        model = from_pretrained("auto")
        return dequantize.dequantize(model, self) if is_float32 else model

    def transformers_config(self) -> BitsAndBytesConfig:
        """Return the settings by which transformers packs a model in this format."""
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
        )
