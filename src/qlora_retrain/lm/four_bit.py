"""Quantize one tensor to 4 bits, on a GPU or on all cores, with the bits of bitsandbytes.

On a GPU this is one call of bitsandbytes. On the CPU bitsandbytes' formula runs here, in chunks. `torch.bucketize`
takes three quarters of bitsandbytes' time there; counting the bounds below a number gives the same code in a tenth of
it. The temporaries of a chunk stay in the cache; those of a whole tensor are 8 times its 16-bit size. NumPy computes on
a chunk without Python's lock, so threads share a tensor.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from qlora_retrain.core.errors import IntegrityError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from bitsandbytes.functional import QuantState
    from numpy.typing import NDArray

BLOCK_SIZE = 64  # weights that share a scale
SCALES_PER_GROUP = 256  # scales that share a second scale, with double quantization
CHUNK_WEIGHTS = 1 << 17  # their fp32 form and a temporary have 1 MiB, the second-level cache of a core
_TRIAL_BLOCKS = 512
_TINY = 1e-38  # bitsandbytes' least divisor, for a block of zeros


def quantize(
    weights: torch.Tensor, quant_type: str, double_quant: bool, device: str
) -> tuple[torch.Tensor, QuantState]:
    """Return the codes, two in a byte, (ceil(weights / 2), 1), and the scales, on the CPU.

    Args:
        weights: (out, in), in fp32, fp16 or bf16, on the CPU. At most 1/3 of its 16-bit size is needed beside it on the
            CPU, and its own size on a GPU.
        quant_type: `nf4` or `fp4`.
        double_quant: Whether the scales are quantized too.
        device: `cpu`, or `cuda` for bitsandbytes' own kernel there.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise

    if device != "cpu":
        codes, state = quantize_4bit(
            weights.contiguous().to(device),
            blocksize=BLOCK_SIZE,
            compress_statistics=double_quant,
            quant_type=quant_type,
        )
        state.to("cpu")
        return codes.cpu(), state

    codes, absmax = _quantize_in_chunks(weights.contiguous().view(-1), quant_type)
    settings = {"shape": weights.shape, "dtype": weights.dtype, "blocksize": BLOCK_SIZE, "quant_type": quant_type}
    settings["code"] = get_4bit_type(quant_type, device="cpu")
    if not double_quant:
        return codes, QuantState(absmax=absmax, **settings)
    offset = absmax.mean()
    absmax_codes, absmax_state = quantize_blockwise(absmax - offset, blocksize=SCALES_PER_GROUP)
    return codes, QuantState(absmax=absmax_codes, offset=offset, state2=absmax_state, **settings)


def refuse_another_code(quant_type: str) -> None:
    """Compare the formula here with the installed bitsandbytes, on random numbers, on bounds and on zeros.

    Raises:
        IntegrityError: If a bit differs.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit

    numbers = torch.randn(_TRIAL_BLOCKS, BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
    # Each bound with both its neighbours in fp32; a 1 makes the block's scale 1.
    bounds = torch.from_numpy(bounds_and_codes(quant_type)[0])
    ties = torch.cat([bounds, bounds.nextafter(torch.ones(())), bounds.nextafter(-torch.ones(())), torch.ones(1)])
    numbers[-1, :], numbers[-2, : len(ties)], numbers[-2, len(ties) :] = 0, ties, 0
    expected, state = quantize_4bit(numbers, blocksize=BLOCK_SIZE, quant_type=quant_type)
    codes, absmax = _quantize_in_chunks(numbers.view(-1), quant_type)
    if not (torch.equal(codes, expected) and torch.equal(absmax, state.absmax)):
        raise IntegrityError(
            f"the installed bitsandbytes gives other {quant_type} codes than expected; install the versions of "
            "environment.lock"
        )


def _quantize_in_chunks(weights: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and fp32 scales of a flat tensor."""
    import numpy as np
    import torch
    from bitsandbytes.functional import quantize_4bit

    num_whole = weights.numel() // BLOCK_SIZE * BLOCK_SIZE
    codes = np.empty((num_whole // 2, 1), np.uint8)
    absmax = np.empty(num_whole // BLOCK_SIZE, np.float32)
    bounds, code_of_rank = bounds_and_codes(quant_type)

    def quantize_chunk(start: int) -> None:
        end = min(start + CHUNK_WEIGHTS, num_whole)
        blocks = _float32(weights[start:end]).reshape(-1, BLOCK_SIZE)
        scales = np.abs(blocks).max(1)
        with np.errstate(invalid="ignore"):  # an infinite number, which is refused by its scale
            ratios = (blocks * (1 / np.maximum(scales, _TINY))[:, None]).reshape(-1)
        ranks = np.zeros(end - start, np.uint8)
        for bound in bounds:
            ranks += ratios > bound
        pairs = code_of_rank[ranks].reshape(-1, 2)
        codes[start // 2 : end // 2, 0] = pairs[:, 0] << 4 | pairs[:, 1]
        absmax[start // BLOCK_SIZE : end // BLOCK_SIZE] = scales

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(quantize_chunk, range(0, num_whole, CHUNK_WEIGHTS)))
    if num_whole == weights.numel():
        return torch.from_numpy(codes), torch.from_numpy(absmax)
    # bitsandbytes divides an incomplete block at the end by its scale, and rounds otherwise than above.
    last_codes, state = quantize_4bit(weights[num_whole:], blocksize=BLOCK_SIZE, quant_type=quant_type)
    return (
        torch.cat([torch.from_numpy(codes), last_codes]),
        torch.cat([torch.from_numpy(absmax), cast(torch.Tensor, state.absmax)]),
    )


def bounds_and_codes(quant_type: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return the 15 bounds between the levels, ascending, and the code of each of the 16 levels in that order."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(levels)
    bounds: NDArray[np.float32] = ((levels[order[:-1]] + levels[order[1:]]) / 2).numpy()
    return bounds, order.to(torch.uint8).numpy()


def _float32(weights: torch.Tensor) -> NDArray[Any]:
    """Return a flat tensor's numbers in fp32; NumPy has no bfloat16, which is the upper half of an fp32."""
    import numpy as np
    import torch

    if weights.dtype != torch.bfloat16:
        return weights.numpy().astype(np.float32, copy=False)
    return (weights.view(torch.uint16).numpy().astype(np.uint32) << np.uint32(16)).view(np.float32)
