"""Blocks of 64 weights in NF4, in NF4 with a constant subtracted, and in 8 bits: each computed a second way."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit
from torch import Tensor

from qlora_retrain.lm import block_shifts, four_bit
from qlora_retrain.lm.base_formats.block_layouts import Int8Layout, Nf4Layout

# As QLoRA prints them (arXiv 2305.14314, appendix E).
LEVELS = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
LAYOUTS = [Nf4Layout("float32"), Nf4Layout("float32", is_shifted=True), Int8Layout("float32")]


def random_weights(*shape: int, offset: float = 0.0) -> Tensor:
    """Weights whose blocks lie around another number each, where an offset is given."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(*shape, generator=generator) * 0.02
    return weights + (offset * torch.randn(shape[0], shape[1] // 64, generator=generator)).repeat_interleave(64, 1)


def nearest_codes(blocks: Tensor) -> Tensor:
    ratios = blocks / blocks.abs().amax(-1, keepdim=True)
    return (ratios[..., None] - LEVELS).abs().argmin(-1)


def codes_of(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], -1).flatten(1).view(-1, 64)


def relative_error(values: Tensor, weights: Tensor) -> float:
    return float((values.float() - weights.float()).norm() / weights.float().norm())


def test_no_other_constant_of_the_search_gives_more_entropy() -> None:
    blocks = random_weights(2, 640, offset=0.01).view(-1, 64).double()
    median = blocks.sort(1).values[:, 31]
    distance = (blocks - median[:, None]).abs().amax(1)
    # The deviation of a normal distribution whose quantile of NF4's outermost level is 1.
    deviation = 1 / torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.9677083))
    candidates = [median + 0.1 * deviation * i / 100 * distance for i in range(-100, 101)]
    entropies = torch.stack([block_shifts.entropy_bits(nearest_codes(blocks - shift[:, None])) for shift in candidates])
    shifts = block_shifts.choose_shifts(blocks.float().flatten())
    of_chosen = block_shifts.entropy_bits(nearest_codes(blocks - shifts[:, None]))
    torch.testing.assert_close(of_chosen, entropies.max(0).values, rtol=0, atol=1e-5)
    assert ((shifts - median).abs() <= 0.0542 * distance).all()
    # Entropy computed by its definition.
    counts = torch.bincount(nearest_codes(blocks)[0], minlength=16) / 64
    expected = -sum(p * p.log2() for p in counts if p)
    assert float(block_shifts.entropy_bits(nearest_codes(blocks))[0]) == pytest.approx(float(expected))


def test_of_equal_entropies_the_constant_nearest_to_the_median_is_taken() -> None:
    # Two values: every constant between them gives one bit.
    block = torch.tensor([-1.0, 1.0]).repeat(32)
    assert block_shifts.choose_shifts(block).tolist() == [-1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_incomplete_block_has_a_constant_too(dtype: torch.dtype) -> None:
    weights = random_weights(1, 128).flatten()[:100].to(dtype)
    shifts = block_shifts.choose_shifts(weights)
    assert shifts.shape == (2,)
    assert shifts.dtype == torch.float32
    assert weights[64:].min() < shifts[1] < weights[64:].max()


@pytest.mark.parametrize(("offset", "error_ratio"), [(0.0, (1.0, 1.02)), (0.01, (0.8, 0.95))])
def test_a_constant_gives_codes_more_entropy_and_blocks_off_zero_less_error(
    offset: float, error_ratio: tuple[float, float]
) -> None:
    weights, entropies, errors = random_weights(256, 512, offset=offset), [], []
    for layout in LAYOUTS[:2]:
        tensors = layout.pack(weights)
        entropies.append(float(block_shifts.entropy_bits(codes_of(tensors["weight"])).mean()))
        errors.append(relative_error(layout.unpack(tensors), weights))
    # Of the 0.074 bits that the search gains, 0.007 are lost where the constant is rounded to 8 bits.
    assert entropies[1] > entropies[0] + 0.06
    # Around zero already, a block has no less error: entropy alone decides.
    low, high = error_ratio
    assert low < errors[1] / errors[0] < high


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nf4_has_the_values_of_bitsandbytes_bit_for_bit(dtype: str) -> None:
    weights = random_weights(96, 192).to(getattr(torch, dtype))
    layout = Nf4Layout(dtype)
    tensors = layout.pack(weights)
    assert torch.equal(layout.unpack(tensors), dequantize_4bit(*four_bit.quantize(weights, "nf4", True, "cpu")))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_are_those_of_the_stored_tensors_by_hand(layout) -> None:
    weights = random_weights(96, 256, offset=0.01)
    tensors = layout.pack(weights)
    forms = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
    assert forms == layout.tensors(96, 256)

    def numbers(name: str) -> Tensor:
        groups = tensors[f"{name}_groups"].repeat_interleave(256)[: tensors[name].numel()].view(96, 4)
        return (create_dynamic_map()[tensors[name].long()] * groups + tensors[f"{name}_mean"])[..., None]

    if isinstance(layout, Int8Layout):
        expected = tensors["weight"].view(96, 4, 64) * numbers("scales")
    else:
        expected = LEVELS[codes_of(tensors["weight"]).long().view(96, 4, 64)] * numbers("scales")
    if "shifts" in tensors:
        expected = expected + numbers("shifts")
        # The codes are of what the stored constant leaves, so its own rounding is no error of a weight.
        left = weights.view(96, 4, 64) - numbers("shifts")
        assert (nearest_codes(left).view(-1, 64) == codes_of(tensors["weight"])).float().mean() > 0.999
    torch.testing.assert_close(layout.unpack(tensors), expected.flatten(1), rtol=1e-5, atol=1e-7)


def test_8_bits_are_the_nearest_multiple_of_the_stored_scale() -> None:
    weights, layout = random_weights(96, 256), Int8Layout("float32")
    tensors = layout.pack(weights)
    values = layout.unpack(tensors).view(-1, 64)
    steps = values.abs().amax(1, keepdim=True) / tensors["weight"].abs().view(-1, 64).amax(1, keepdim=True)
    is_cut = tensors["weight"].view(-1, 64).abs() == 127
    assert ((values - weights.view(-1, 64)).abs() <= 0.501 * steps)[~is_cut].all()
    # The stored scale is at most a hundredth below the block's, so less is cut off than two steps.
    assert ((values - weights.view(-1, 64)).abs() <= 2 * steps).all()
    assert relative_error(values.view_as(weights), weights) < 0.0065


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_weights_are_kept(layout, value: float) -> None:
    weights = torch.full((8, 128), value)
    torch.testing.assert_close(layout.unpack(layout.pack(weights)), weights)
    # Beside others, a block of zeros stays one.
    weights = random_weights(8, 128)
    weights[3, 64:] = 0
    assert layout.unpack(layout.pack(weights))[3, 64:].abs().max() < (1e-3 if "True" in str(layout) else 1e-30)
