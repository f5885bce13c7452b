"""`quantize.format: int4`: 4-bit integers in groups of 32 inputs, each with a step and a minimum in fp16.

    w = d q + m        q in 0..15, 5 bits a weight

The numbers are those of llama.cpp's Q4_1 blocks, by the rule of its reference quantizer. So a GGUF file of this type
holds exactly what was trained over, and an adapter that adds one number to all weights of a group changes m alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qlora_retrain.lm.base_formats.packed_linear import CODES, Layout, PackedFormat, TensorForm

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZE = 32
SCALES, MINIMA = "scales", "minima"
_MAX_CODE = 15
_HALF = GROUP_SIZE // 2
_CHUNK_WEIGHTS, _CHUNK_WEIGHTS_GPU = 1 << 17, 1 << 26  # packed at a time; on a CPU what stays in a core's cache


class GroupLayout(Layout):
    """Codes (out, in / 2), steps and minima (out, in / 32).

    A byte has the code of input i of a group in its lower half, and that of input i + 16 in its upper half.
    """

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorForm]:
        """Return the forms of the three tensors."""
        groups = ("float16", (out_features, in_features // GROUP_SIZE))
        return {CODES: ("uint8", (out_features, in_features // 2)), SCALES: groups, MINIMA: groups}

    def pack(self, weights: Tensor) -> dict[str, Tensor]:
        """Return codes, steps and minima; a number beyond fp16 gives infinite ones, which the caller looks for."""
        import torch

        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=weights.device)
            for name, (dtype, shape) in self.tensors(*weights.shape).items()
        }
        rows = max(1, (_CHUNK_WEIGHTS_GPU if weights.is_cuda else _CHUNK_WEIGHTS) // weights.shape[1])
        for start in range(0, len(weights), rows):
            for name, part in _pack_rows(weights[start : start + rows]).items():
                tensors[name][start : start + rows] = part
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return d q + m in fp32, as llama.cpp computes it: d q has 15 digits, so only the sum is rounded."""
        import torch

        codes = tensors[CODES].view(*tensors[SCALES].shape, _HALF)  # (out, groups, 16)
        # In fp32, since a CPU takes three times as long in fp16.
        values = torch.empty(*tensors[SCALES].shape, GROUP_SIZE, device=codes.device)
        values[..., :_HALF], values[..., _HALF:] = codes & _MAX_CODE, codes >> 4
        scales, minima = (tensors[name].float().unsqueeze(-1) for name in (SCALES, MINIMA))
        return values.mul_(scales).add_(minima).flatten(1)


@dataclass(frozen=True, slots=True)
class Int4(PackedFormat):
    """4-bit integers in groups of 32.

    A layer whose inputs do not fill groups stays in 16 bits, as llama.cpp leaves it; `quantize.min_quantized_fraction`
    refuses a base with many of them.

    Attributes:
        compute_dtype: The type of what is not packed.
    """

    tensor_names: ClassVar[tuple[str, ...]] = (SCALES, MINIMA)
    scratch_bytes_per_weight: ClassVar[int] = 6  # the values in fp32, and in the type of the arithmetic
    compute_dtype: str

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Take the values of the section `quantize`, or of config.json."""
        return cls(settings["compute_dtype"])

    def quantization(self) -> dict[str, Any]:
        """Return the settings, and for other readers the size of a group."""
        return {"format": "int4", "compute_dtype": self.compute_dtype, "group_size": GROUP_SIZE}

    @property
    def bits_per_weight(self) -> float:
        """5: 4 of the code, and two numbers of 16 bits for 32 weights."""
        return self.code_bits_per_weight + 2 * 16 / GROUP_SIZE

    @property
    def code_bits_per_weight(self) -> float:
        """4, a number from 0 to 15."""
        return 4.0

    def layout(self, name: str, out_features: int, in_features: int) -> Layout | None:
        """Return the only layout there is."""
        return GroupLayout() if in_features % GROUP_SIZE == 0 else None

    def count_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Two codes are in a byte."""
        rows, row_bytes = shapes[CODES]
        return 2 * rows * row_bytes


def _pack_rows(weights: Tensor) -> dict[str, Tensor]:
    """Pack some rows by the rule of `quantize_row_q4_1_ref`: minimum and maximum are codes 0 and 15."""
    import torch

    groups = weights.to(torch.float32, copy=True).view(len(weights), -1, GROUP_SIZE)  # (rows, groups, 32)
    minima, maxima = torch.aminmax(groups, dim=-1, keepdim=True)
    steps = (maxima - minima) / _MAX_CODE
    # Where all weights of a group are equal, the step is 0 and so are the codes.
    inverse = torch.where(steps == 0, 0.0, 1 / steps)
    # In place, since temporaries of this size leave holes in the heap.
    codes = groups.sub_(minima).mul_(inverse).add_(0.5).clamp_(0, _MAX_CODE).to(torch.uint8)
    codes = codes[..., :_HALF] | codes[..., _HALF:] << 4
    return {CODES: codes.flatten(1), SCALES: steps.squeeze(-1).half(), MINIMA: minima.squeeze(-1).half()}
