"""How a layer's weight is stored in blocks of 64 inputs: NF4, NF4 of what a constant leaves, and 8-bit integers.

Every block has a scale, and the scales have 8 bits: 256 of them share a second scale of 32 bits, as with double
quantization of QLoRA. The constants are stored alike. bitsandbytes computes the 8 bits of both, and unpacks NF4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from qlora_retrain.lm import block_shifts, four_bit
from qlora_retrain.lm.base_formats.packed_linear import CODES, Layout, TensorForm
from qlora_retrain.lm.four_bit import BLOCK_SIZE, SCALES_PER_GROUP

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALES, SHIFTS = "scales", "shifts"
_GROUPS, _MEAN = "_groups", "_mean"  # after the name of what has 8 bits: the second scales, and what was subtracted
SCALE_TENSORS = (SCALES, f"{SCALES}{_GROUPS}", f"{SCALES}{_MEAN}")
SHIFT_TENSORS = (SHIFTS, f"{SHIFTS}{_GROUPS}", f"{SHIFTS}{_MEAN}")
BITS_OF_8 = (8 + 32 / SCALES_PER_GROUP) / BLOCK_SIZE  # of a weight, for one number a block in 8 bits
_MAX_INT8 = 127
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Nf4Layout(Layout):
    """4 bits a weight, two in a byte, in the order of bitsandbytes.

    Attributes:
        compute_dtype: The type to which the weight is unpacked.
        is_shifted: Whether a constant is subtracted from each block before, and added again.
    """

    compute_dtype: str
    is_shifted: bool = False

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorForm]:
        """Return the forms of codes and scales, and of the constants."""
        blocks = (out_features, in_features // BLOCK_SIZE)
        forms: dict[str, TensorForm] = {CODES: ("uint8", (out_features, in_features // 2)), **_forms(SCALES, blocks)}
        return forms | (_forms(SHIFTS, blocks) if self.is_shifted else {})

    def pack(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the tensors; the codes are of the weights less the constants as they are stored."""
        import torch

        tensors: dict[str, Tensor] = {}
        parts: Iterable[Tensor] = _chunks(weights)
        if self.is_shifted:
            shifts = torch.cat([block_shifts.choose_shifts(part.flatten()).view(len(part), -1) for part in parts])
            tensors = _pack_numbers(SHIFTS, shifts)
            parts = _less_shifts(_chunks(weights), _unpack_numbers(SHIFTS, tensors))

        codes, scales = [], []
        for part in parts:
            part_codes, state = four_bit.quantize(part, "nf4", False, part.device.type)
            codes.append(part_codes.view(len(part), -1))
            scales.append(state.absmax.view(len(part), -1))
        stored_scales = _pack_numbers(SCALES, torch.cat(scales).to(weights.device))
        return {CODES: torch.cat(codes).to(weights.device), **stored_scales, **tensors}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return level x scale, plus the constant; both are rounded to the type of the arithmetic."""
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        codes, scales = tensors[CODES], _unpack_numbers(SCALES, tensors)
        dtype = getattr(torch, self.compute_dtype)
        shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
        state = QuantState(
            scales.flatten(), shape, _nf4_levels(codes.device), BLOCK_SIZE, quant_type="nf4", dtype=dtype
        )
        weights: Tensor = dequantize_4bit(codes.reshape(-1, 1), state)
        if self.is_shifted:
            weights.view(*scales.shape, BLOCK_SIZE).add_(_unpack_numbers(SHIFTS, tensors).to(dtype)[..., None])
        return weights


@dataclass(frozen=True, slots=True)
class Int8Layout(Layout):
    """8-bit integers times the scale of their block.

    Attributes:
        compute_dtype: The type to which the weight is unpacked.
    """

    compute_dtype: str

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorForm]:
        """Return the forms of codes and scales."""
        blocks = (out_features, in_features // BLOCK_SIZE)
        return {CODES: ("int8", (out_features, in_features)), **_forms(SCALES, blocks)}

    def pack(self, weights: Tensor) -> dict[str, Tensor]:
        """Return codes and scales; the codes are rounded for the scales as they are stored."""
        import torch

        parts = [part.unflatten(1, (-1, BLOCK_SIZE)) for part in _chunks(weights)]
        tensors = _pack_numbers(SCALES, torch.cat([part.float().abs().amax(-1) for part in parts]) / _MAX_INT8)
        scales = _unpack_numbers(SCALES, tensors)[..., None]
        # A stored scale may be 0, or a little smaller than the block's; then its largest numbers are cut off.
        inverse_parts = torch.where(scales == 0, 0.0, 1 / scales).split([len(part) for part in parts])
        codes = [
            (part.float() * inverse).round_().clamp_(-_MAX_INT8, _MAX_INT8).char().flatten(1)
            for part, inverse in zip(parts, inverse_parts, strict=True)
        ]
        return {CODES: torch.cat(codes), **tensors}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return code x scale, rounded to the type of the arithmetic."""
        import torch

        scales = _unpack_numbers(SCALES, tensors)
        values = tensors[CODES].to(getattr(torch, self.compute_dtype)).view(*scales.shape, BLOCK_SIZE)
        return values.mul_(scales[..., None].to(values.dtype)).flatten(1)


def _chunks(weights: Tensor) -> Sequence[Tensor]:
    """Return some rows after the other, so that no temporary in fp32 is as large as the weight."""
    return cast("Sequence[Tensor]", weights.split(max(1, _CHUNK_WEIGHTS // weights.shape[1])))


def _less_shifts(parts: Sequence[Tensor], shifts: Tensor) -> Iterator[Tensor]:
    """Yield each part (rows, in) in fp32 less the shifts (out, blocks) of its rows."""
    for part, part_shifts in zip(parts, shifts.split([len(part) for part in parts]), strict=True):
        yield (part.float().unflatten(1, (-1, BLOCK_SIZE)) - part_shifts[..., None]).flatten(1)


def _forms(name: str, blocks: tuple[int, int]) -> dict[str, TensorForm]:
    groups = -(-blocks[0] * blocks[1] // SCALES_PER_GROUP)
    return {
        name: ("uint8", blocks),
        f"{name}{_GROUPS}": ("float32", (groups,)),
        f"{name}{_MEAN}": ("float32", (1,)),
    }


def _pack_numbers(name: str, numbers: Tensor) -> dict[str, Tensor]:
    """Return one number a block (out, blocks) as 8 bits around their mean, in groups of 256."""
    from bitsandbytes.functional import quantize_blockwise

    mean = numbers.mean().reshape(1)
    codes, state = quantize_blockwise(
        (numbers - mean).flatten(), code=_dynamic_levels(numbers.device), blocksize=SCALES_PER_GROUP
    )
    return {name: codes.view(numbers.shape), f"{name}{_GROUPS}": state.absmax, f"{name}{_MEAN}": mean}


def _unpack_numbers(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the numbers (out, blocks) in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    codes, groups, mean = (tensors[f"{name}{part}"] for part in ("", _GROUPS, _MEAN))
    levels = _dynamic_levels(codes.device)
    numbers: Tensor = dequantize_blockwise(codes.flatten(), absmax=groups, code=levels, blocksize=SCALES_PER_GROUP)
    return numbers.add_(mean).view(codes.shape)


@cache
def _nf4_levels(device: torch.device) -> Any:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device=device)


@cache
def _dynamic_levels(device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    levels: Tensor = create_dynamic_map().to(device)
    return levels
