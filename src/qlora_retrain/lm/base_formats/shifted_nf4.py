"""`quantize.format: nf4-shifted`: NF4 of what is left when a constant is subtracted from each block of 64 weights.

The constant is the one for which the block's codes carry the most information (IR-QLoRA, arXiv 2402.05445, sec. 3.2;
`block_shifts`). Constants and scales have 8 bits each, so a weight has 4.254.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from qlora_retrain.lm.base_formats.block_layouts import BITS_OF_8, SCALE_TENSORS, SHIFT_TENSORS, Nf4Layout
from qlora_retrain.lm.base_formats.packed_linear import CODES, Layout, PackedFormat
from qlora_retrain.lm.four_bit import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class ShiftedNf4(PackedFormat):
    """NF4 with a constant a block; a layer whose inputs do not fill blocks stays in 16 bits.

    Attributes:
        compute_dtype: The type to which weights are unpacked, and of what is not packed.
    """

    tensor_names: ClassVar[tuple[str, ...]] = (*SCALE_TENSORS, *SHIFT_TENSORS)
    scratch_bytes_per_weight: ClassVar[int] = 2
    compute_dtype: str

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Take the values of the section `quantize`, or of config.json."""
        return cls(settings["compute_dtype"])

    def quantization(self) -> dict[str, Any]:
        """Return the settings, and for other readers the size of a block."""
        return {"format": "nf4-shifted", "compute_dtype": self.compute_dtype, "block_size": BLOCK_SIZE}

    @property
    def bits_per_weight(self) -> float:
        """4.254: 4 of the code, and 8 of the scale and of the constant for 64 weights, with their second scales."""
        return 4 + 2 * BITS_OF_8

    @property
    def code_bits_per_weight(self) -> float:
        """4, one of 16 levels."""
        return 4.0

    def layout(self, name: str, out_features: int, in_features: int) -> Layout | None:
        """Return the only layout there is."""
        return Nf4Layout(self.compute_dtype, is_shifted=True) if in_features % BLOCK_SIZE == 0 else None

    def count_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Two codes are in a byte."""
        rows, row_bytes = shapes[CODES]
        return 2 * rows * row_bytes
