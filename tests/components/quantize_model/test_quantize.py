"""Quantizing the tiny model: what is stored, how far it is from the original, and what is refused."""

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file

from components.quantize_model import quantization_stats
from components.quantize_model.step import run
from qlora_retrain.config.sections import QuantizeConfig
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import loading

# The levels as the paper prints them (arXiv 2305.14314, appendix E), to four digits.
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]


def quantize(base: Path, folder: Path, **settings) -> Path:
    folder.mkdir()
    run(QuantizeConfig(**settings), base, folder)
    return folder


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4.5)])
def test_the_bits_per_weight_are_those_of_the_methods_arithmetic(tiny_model, tmp_path, double_quant, bits):
    folder = quantize(tiny_model, tmp_path / "nf4", double_quant=double_quant)
    document = json.loads((folder / "quantization.json").read_text())
    assert document["bits_per_weight"] == pytest.approx(bits, rel=0.01)

    # Counted a second way: every stored byte whose name begins with a quantized layer's.
    tensors = load_file(folder / "model.safetensors")
    layers = {name.removesuffix(".absmax") for name in tensors if name.endswith(".weight.absmax")}
    weights = sum(2 * tensors[name].numel() for name in layers)
    stored_bytes = sum(t.numel() * t.element_size() for n, t in tensors.items() if any(n.startswith(x) for x in layers))
    assert document["quantized_weights"] == weights == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert document["bits_per_weight_with_tables"] == pytest.approx(8 * stored_bytes / weights, abs=1e-4)


def test_every_weight_becomes_the_nearest_level_of_its_block(tiny_model, tmp_path):
    folder = quantize(tiny_model, tmp_path / "nf4", double_quant=False)
    name = "model.layers.0.mlp.up_proj"
    original = load_file(tiny_model / "model.safetensors")[f"{name}.weight"].float().reshape(-1, 64)
    scale = original.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = levels[(original / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)] * scale

    module = loading.load_nf4(folder, dtype="bfloat16").get_submodule(name)
    stored = dequantize_4bit(module.weight.data, module.weight.quant_state).float().reshape(-1, 64)

    # A bf16 weight may lie midway between two levels: what counts is that no level is nearer than the stored one.
    assert ((original - stored).abs() <= (original - nearest).abs() + 0.005 * scale).all()

    relative_error = float((original - nearest).norm() / original.norm())
    document = json.loads((folder / "quantization.json").read_text())
    assert document["relative_error_by_layer"].keys() == {
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    }  # fmt: skip
    assert document["relative_error_by_layer"]["up_proj"] == pytest.approx(relative_error, rel=0.05)


def test_double_quantization_costs_less_than_a_hundredth_more_error(tiny_model, tmp_path):
    single, double = (quantize(tiny_model, tmp_path / str(d), double_quant=d) for d in (False, True))
    errors = [json.loads((f / "quantization.json").read_text())["relative_error"] for f in (single, double)]
    assert errors[0] <= errors[1] < errors[0] * 1.01


def test_the_same_base_gives_the_same_bytes_readable_by_everyone(tiny_model, tmp_path):
    first, second = quantize(tiny_model, tmp_path / "a"), quantize(tiny_model, tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert {"config.json", "model.safetensors", "quantization.json", "tokenizer.json"} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
        assert stat.S_IMODE((first / name).stat().st_mode) == 0o644
        assert str(tmp_path).encode() not in (first / name).read_bytes()
    assert (first / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()


def test_a_bitsandbytes_with_other_blocks_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization_stats, "BLOCK_SIZE", 128)
    with pytest.raises(IntegrityError, match=r"4\.1\d+ bits per weight are stored where 4\.06\d* are expected"):
        quantize(tiny_model, tmp_path / "nf4")


def test_an_unsafe_base_is_refused(tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"pytorch_model\.bin"):
        quantize(base, tmp_path / "nf4")


def test_a_base_without_a_chat_template_is_refused(tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="no chat template"):
        quantize(base, tmp_path / "nf4")


def test_a_saved_model_that_loads_with_one_bit_flipped_is_refused(tiny_model, tmp_path, monkeypatch):
    load = loading.load_nf4

    def load_damaged(folder, **options):
        model = load(folder, **options)
        model.get_submodule("model.layers.0.mlp.up_proj").weight.data[0] ^= 1
        return model

    monkeypatch.setattr(loading, "load_nf4", load_damaged)
    with pytest.raises(IntegrityError, match="loads with other tensors"):
        quantize(tiny_model, tmp_path / "nf4")


def test_weights_that_are_not_finite_are_refused(tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight holds numbers that are not finite"):
        quantize(base, tmp_path / "nf4")
