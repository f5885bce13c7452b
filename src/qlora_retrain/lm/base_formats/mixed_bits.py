"""`quantize.format: mixed`: each linear layer has NF4 or 8-bit integers, within a budget of bits.

`quantize_model` measures both errors of every layer and gives 8 bits to those that avoid the most squared error
(`bit_budget`). The layers' names are in config.json, so a folder says itself which layer has which form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from qlora_retrain.lm import bit_budget
from qlora_retrain.lm.base_formats.block_layouts import BITS_OF_8, SCALE_TENSORS, SCALES, Int8Layout, Nf4Layout
from qlora_retrain.lm.base_formats.packed_linear import Layout, PackedFormat
from qlora_retrain.lm.four_bit import BLOCK_SIZE

DEFAULT_BITS = 5.0
FEW_BITS, MANY_BITS = 4 + BITS_OF_8, 8 + BITS_OF_8  # of a weight in either form


@dataclass(frozen=True, slots=True)
class MixedBits(PackedFormat):
    """NF4 with scales of 8 bits, as `nf4` has it, or integers of 8 bits; 16 bits where inputs do not fill blocks.

    Attributes:
        compute_dtype: The type to which weights are unpacked, and of what is not packed.
        bits: Of a weight on average: the budget, or what the choice has of it.
        layers_in_8_bits: The paths of the layers, once they are chosen.
    """

    tensor_names: ClassVar[tuple[str, ...]] = SCALE_TENSORS
    scratch_bytes_per_weight: ClassVar[int] = 2
    compute_dtype: str
    bits: float
    layers_in_8_bits: frozenset[str] = frozenset()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Take the values of the section `quantize`, or of config.json, which has the choice too."""
        bits = settings["bits_per_weight"]
        layers = frozenset(settings.get("layers_in_8_bits", ()))
        return cls(settings["compute_dtype"], DEFAULT_BITS if bits is None else bits, layers)

    def choose(self, sizes: Mapping[str, int], avoided_errors: Mapping[str, float]) -> Self:
        """Return the format with the layers chosen for which the budget has 8 bits, and with the bits that they take.

        Args:
            sizes: The number of weights of each layer, by its path.
            avoided_errors: The squared error of each in 4 bits, less that in 8.
        """
        total = sum(sizes.values())
        capacity = int(total * (self.bits - FEW_BITS) / (MANY_BITS - FEW_BITS))
        is_chosen = bit_budget.choose_layers(list(sizes.values()), [avoided_errors[name] for name in sizes], capacity)
        layers = frozenset(name for name, has_8_bits in zip(sizes, is_chosen, strict=True) if has_8_bits)
        share = sum(sizes[name] for name in layers) / total
        return replace(self, bits=FEW_BITS + share * (MANY_BITS - FEW_BITS), layers_in_8_bits=layers)

    def quantization(self) -> dict[str, Any]:
        """Return the settings with the choice, and for other readers the size of a block."""
        return {
            "format": "mixed",
            "compute_dtype": self.compute_dtype,
            "block_size": BLOCK_SIZE,
            "bits_per_weight": self.bits,
            "layers_in_8_bits": sorted(self.layers_in_8_bits),
        }

    @property
    def bits_per_weight(self) -> float:
        """The budget, or once the layers are chosen what they take of it."""
        return self.bits

    @property
    def code_bits_per_weight(self) -> float:
        """The same without the scales, of which every block has one in either form."""
        return self.bits - BITS_OF_8

    def layout(self, name: str, out_features: int, in_features: int) -> Layout | None:
        """Return the layout that was chosen for a layer."""
        if in_features % BLOCK_SIZE:
            return None
        return (Int8Layout if name in self.layers_in_8_bits else Nf4Layout)(self.compute_dtype)

    def count_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """64 weights have a scale."""
        rows, blocks = shapes[SCALES]
        return BLOCK_SIZE * rows * blocks
