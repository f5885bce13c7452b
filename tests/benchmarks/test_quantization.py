"""Int4 as the benchmark rounds it, and where it puts it in a model."""

import torch

from benchmarks import quantization


def test_int4_takes_the_nearest_of_fifteen_levels_of_each_block_of_64():
    numbers = torch.randn(12, 96, generator=torch.Generator().manual_seed(0))  # blocks run over the rows' ends
    rounded = quantization.int4(numbers).reshape(-1)
    flat = numbers.reshape(-1).tolist()

    # By hand: the nearest of 15 levels between minus and plus the block's largest number.
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = max(map(abs, block))
        levels = [largest * i / 7 for i in range(-7, 8)]
        expected = [min(levels, key=lambda level: abs(level - x)) for x in block]
        torch.testing.assert_close(rounded[start : start + 64], torch.tensor(expected))


def test_int4_keeps_a_block_of_zeros_and_the_precision():
    rounded = quantization.int4(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    assert not rounded.any()


def test_int4_is_put_where_bitsandbytes_would_quantize_and_nowhere_else(tiny_model, tmp_path):
    from bitsandbytes.nn import Linear4bit

    from components.quantize_model.step import run
    from qlora_retrain.config.sections import QuantizeConfig
    from qlora_retrain.lm import loading

    before, model = loading.load_base(tiny_model), loading.load_base(tiny_model)
    error = quantization.to_int4(model)
    old = before.state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, old[name])}

    # bitsandbytes itself says which layers it quantizes.
    run(QuantizeConfig(), tiny_model, tmp_path)
    in_4_bits = loading.load_nf4(tmp_path, dtype="bfloat16").named_modules()
    assert changed == {f"{name}.weight" for name, module in in_4_bits if isinstance(module, Linear4bit)}
    pairs = [(model.state_dict()[name].double(), old[name].double()) for name in changed]
    squared_error, squared_norm = (
        sum(float(x.pow(2).sum()) for x in xs) for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    assert abs(error - (squared_error / squared_norm) ** 0.5) < 1e-4
