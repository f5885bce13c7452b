"""`quantize.format: mixed` on the tiny model: the layers with 8 bits are the best ones, and the folder says which."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from components.quantize_model.step import run
from qlora_retrain.config.quantize import AdapterStart, QuantizeConfig
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import base_formats
from qlora_retrain.lm.base_formats.block_layouts import Int8Layout, Nf4Layout
from qlora_retrain.lm.weight_files import SafetensorsFolder

BUDGET = 5.5


def quantize(base: Path, folder: Path, **settings) -> Path:
    folder.mkdir()
    run(QuantizeConfig(format="mixed", **settings), base, folder)
    return folder


def squared_error(weight: torch.Tensor, layout) -> float:
    return float((layout.unpack(layout.pack(weight)).double() - weight.double()).square().sum())


def test_no_other_layers_would_lose_less_within_the_budget(tiny_model, tmp_path) -> None:
    folder = quantize(tiny_model, tmp_path / "a", bits_per_weight=BUDGET)
    weights = {n: t for n, t in load_file(tiny_model / "model.safetensors").items() if n.endswith("_proj.weight")}
    sizes = np.array([tensor.numel() for tensor in weights.values()])
    layouts = Nf4Layout("bfloat16"), Int8Layout("bfloat16")
    errors = np.array([[squared_error(tensor, layout) for layout in layouts] for tensor in weights.values()])

    # All 2 ^ 14 choices: a column for each layer.
    choices = (np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes))) & 1
    bits = (4.126953125 * sizes.sum() + 4 * choices @ sizes) / sizes.sum()
    totals = np.where(choices, errors[:, 1], errors[:, 0]).sum(1)
    totals[bits > BUDGET] = np.inf
    best = choices[totals.argmin()]

    document = json.loads((folder / "quantization.json").read_text())
    expected = {name.removesuffix(".weight") for name, in_8_bits in zip(weights, best, strict=True) if in_8_bits}
    assert set(document["layers_in_8_bits"]) == expected
    assert document["bits_per_weight_promised"] == pytest.approx(bits[totals.argmin()], abs=1e-5)
    norm = sum(float(tensor.double().square().sum()) for tensor in weights.values())
    assert document["relative_error"] == pytest.approx((totals.min() / norm) ** 0.5, abs=1e-4)

    # What is stored is what was measured, and the same again in the next run.
    base_format = base_formats.from_folder(folder)
    with SafetensorsFolder(folder) as tensors:
        for name, tensor in weights.items():
            layout = layouts[name.removesuffix(".weight") in expected]
            assert torch.equal(base_format.unpack(name, tensors), layout.unpack(layout.pack(tensor)))
    again = quantize(tiny_model, tmp_path / "b", bits_per_weight=BUDGET)
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_more_bits_cost_more_and_lose_less(tiny_model, tmp_path) -> None:
    numbers = []
    for bits in (4.2, 8.2):
        folder = quantize(tiny_model, tmp_path / str(bits), bits_per_weight=bits)
        numbers.append(json.loads((folder / "quantization.json").read_text()))
    assert [len(n["layers_in_8_bits"]) for n in (numbers[0], numbers[-1])] == [0, 14]
    errors = [n["relative_error"] for n in numbers]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01
    assert [n["bits_per_weight"] < bits + 0.02 for n, bits in zip(numbers, (4.2, 8.2), strict=True)] == [True] * 2


def test_too_little_in_linear_layers_is_refused_before_anything_is_measured(tiny_model, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"quantize\.min_quantized_fraction is 1"):
        quantize(tiny_model, tmp_path / "a", min_quantized_fraction=1.0)
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize("base_format", ["nf4-shifted", "mixed"])
def test_weights_that_are_not_finite_are_refused(tiny_model, tmp_path, base_format: str) -> None:
    import shutil

    from safetensors.torch import save_file

    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="a weight of its up_proj layers holds numbers that are not finite"):
        run(QuantizeConfig(format=base_format), base, tmp_path / "stored")


@pytest.mark.parametrize("base_format", ["nf4-shifted", "mixed"])
def test_lora_xs_starts_over_layers_of_our_own(tiny_model, tmp_path, base_format: str) -> None:
    start = AdapterStart(method="lora-xs", rank=2, target_modules="attention", iterations=1)
    run(QuantizeConfig(format=base_format, adapter_start=start), tiny_model, tmp_path)
    assert (tmp_path / "adapter_start/start.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits_per_weight": 5.0}, "bits_per_weight: 5 is for format: mixed, and format is nf4"),
        ({"format": "mixed", "bits_per_weight": 4.0}, "greater than or equal to 4.2"),
        ({"format": "mixed", "double_quant": False}, "double_quant: false is for format: nf4 and fp4"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeConfig(**settings)
