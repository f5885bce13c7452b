"""One tensor in 4 bits, as computed in chunks here, has the bits of bitsandbytes."""

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from qlora_retrain.lm import four_bit


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(512, 512), (64, 1), (3, 43), (1, 64), (7, 9), (257, 1031)])
def test_a_tensor_of_any_shape_gets_bitsandbytes_codes_and_scales(quant_type, double_quant, shape):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    numbers[0] *= 1e-39  # smaller than the least divisor
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # Transposed too, as Conv1D is.
        for weights in (numbers.to(dtype), numbers.to(dtype).T):
            codes, state = four_bit.quantize(weights, quant_type, double_quant, "cpu")
            expected, expected_state = quantize_4bit(
                weights.contiguous(), blocksize=64, compress_statistics=double_quant, quant_type=quant_type
            )
            assert torch.equal(codes, expected)
            parts, expected_parts = state.as_dict(packed=True), expected_state.as_dict(packed=True)
            assert list(parts) == list(expected_parts)
            assert all(torch.equal(parts[name], expected_parts[name]) for name in parts)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_finite_bfloat16_and_its_neighbours_get_bitsandbytes_codes(quant_type):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    every = bits.view(torch.bfloat16)
    every = every[every.isfinite()]
    # A block of neighbours has ratios near 1; among shuffled ones the largest leaves nothing of the others.
    near_one = 1 + torch.rand(1 << 16, generator=torch.Generator().manual_seed(0))
    for numbers in (every, every[torch.randperm(len(every))], (near_one * torch.tensor([1, -1]).repeat(1 << 15))):
        codes, state = four_bit.quantize(numbers.reshape(-1, 64), quant_type, False, "cpu")
        expected, expected_state = quantize_4bit(numbers.reshape(-1, 64), blocksize=64, quant_type=quant_type)
        assert torch.equal(codes, expected)
        assert torch.equal(state.absmax, expected_state.absmax)


def test_the_number_of_threads_changes_no_code(monkeypatch):
    weights = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(2)).bfloat16()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(four_bit, "CHUNK_WEIGHTS", 1 << 12)
    codes, state = four_bit.quantize(weights, "nf4", False, "cpu")
    expected, expected_state = quantize_4bit(weights, blocksize=64, quant_type="nf4")
    assert torch.equal(codes, expected)
    assert torch.equal(state.absmax, expected_state.absmax)
