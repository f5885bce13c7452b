"""The base format `int4`: its numbers are llama.cpp's, and its layers compute as plain ones with these numbers do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from components.quantize_model.step import run as quantize
from qlora_retrain.config.sections import QuantizeConfig
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import base_formats, loading
from qlora_retrain.lm.base_formats.int4 import GroupLayout, Int4

Q4_1 = gguf.GGMLQuantizationType.Q4_1
IDS = torch.tensor([[1, 5, 9, 200, 2]])


def blocks(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """Return the bytes of llama.cpp's blocks with the numbers of a layer."""
    codes, scales, minima = (tensors[name].numpy() for name in ("weight", "scales", "minima"))
    parts = [part[..., None].view(np.uint8) for part in (scales, minima)]
    joined = np.concatenate([*parts, codes.reshape(*scales.shape, 16)], axis=-1)
    return np.asarray(joined.reshape(len(codes), -1))


def write(base: Path, folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    quantize(QuantizeConfig(format="int4", **settings), base, folder)
    return folder


@pytest.fixture(scope="module")
def int4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in this format."""
    return write(tiny_model, tmp_path_factory.mktemp("int4") / "base_nf4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_numbers_are_those_of_llama_cpps_quantizer(dtype: torch.dtype) -> None:
    weights = torch.randn(48, 4096, generator=torch.Generator().manual_seed(0)) * 0.05
    weights[0, :32], weights[1, :64] = 0.0, -0.25  # groups without a range
    weights[2, :32] *= 1e-6  # steps that fp16 cannot tell from zero
    weights[3, :32] *= 1e5  # 6e4 is the last number that fits
    weights = weights.to(dtype)
    tensors = GroupLayout().pack(weights)
    expected = gguf.quants.quantize(weights.float().numpy(), Q4_1)
    assert np.array_equal(blocks(tensors), expected)

    values = GroupLayout().unpack(tensors)
    assert np.array_equal(values.numpy(), gguf.quants.dequantize(expected, Q4_1))
    assert torch.equal(values[1, :64], torch.full((64,), -0.25))
    # A code is at most half a step away, beside what fp16 rounds of step and minimum.
    steps = tensors["scales"].float().repeat_interleave(32, 1)
    assert ((values - weights.float()).abs() <= 0.51 * steps + 2e-3 * weights.float().abs() + 1e-6).all()


@pytest.mark.gpu
def test_on_a_gpu_the_numbers_are_those_of_a_cpu() -> None:
    weights = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    cpu, gpu = GroupLayout().pack(weights), GroupLayout().pack(weights.cuda())
    assert all(torch.equal(cpu[name], gpu[name].cpu()) for name in cpu)
    assert torch.equal(GroupLayout().unpack(cpu), GroupLayout().unpack(gpu).cpu())


def test_what_was_unpacked_is_packed_to_the_same_codes() -> None:
    weights = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    tensors = GroupLayout().pack(weights)
    unpacked = GroupLayout().unpack(tensors)
    assert float((unpacked - weights).norm() / weights.norm()) < 0.1
    assert torch.equal(GroupLayout().pack(unpacked)["weight"], tensors["weight"])


@pytest.mark.parametrize("value", [-70_000.0, 1e30, float("inf"), float("nan")])
def test_numbers_beyond_fp16_are_refused(tiny_model: Path, tmp_path: Path, value: float) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"up_proj layers holds numbers that are not finite, or too large"):
        write(base, tmp_path / "base_nf4")


def write_model(folder: Path, tiny_model: Path, **sizes: Any) -> Path:
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    settings = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, **sizes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **settings))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)  # biases too
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_layer_whose_inputs_do_not_fill_groups_stays_in_16_bits(tiny_model: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tiny_model, intermediate_size=80)
    with pytest.raises(UsageError, match=r"only 80\.6% .* layers that quantize.format packs.*its width does"):
        write(base, tmp_path / "refused")
    # Where no layer fits, nothing is packed whatever the setting is.
    odd = write_model(tmp_path / "odd", tiny_model, hidden_size=40, intermediate_size=72, head_dim=20)
    with pytest.raises(UsageError, match=r"only 0\.0%.*Set quantize.format: nf4, which packs every width$"):
        write(odd, tmp_path / "nothing", min_quantized_fraction=0.0)
    folder = write(base, tmp_path / "base_nf4", min_quantized_fraction=0.5)
    stored, original = (load_file(path / "model.safetensors") for path in (folder, base))
    names = [name for name in stored if name.endswith("_proj.weight") and stored[name].dtype != torch.uint8]
    assert names == ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    assert all(torch.equal(stored[name], original[name]) for name in names)
    document = json.loads((folder / "quantization.json").read_text())
    assert document["bits_per_weight"] == 5
    assert document["quantized_weights"] == 2 * (64 * (64 + 32 + 32 + 64) + 2 * 64 * 80)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_packed_model_computes_as_a_plain_one_with_the_same_weights(
    tiny_model: Path, tmp_path: Path, dtype: str
) -> None:
    folder = write(write_model(tmp_path / "base", tiny_model), tmp_path / "base_nf4")
    model = loading.load_nf4(folder, dtype=dtype)
    # In another way: the original model with llama.cpp's numbers in it.
    plain = loading.load_base(tmp_path / "base", dtype=dtype)
    for name, parameter in plain.named_parameters():
        if "_proj.weight" in name:
            quantized = gguf.quants.quantize(parameter.data.float().numpy(), Q4_1)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(quantized, Q4_1)).to(parameter.dtype)

    hidden = [m.get_input_embeddings()(IDS).detach().requires_grad_() for m in (model, plain)]
    logits = [m(inputs_embeds=h).logits for m, h in zip((model, plain), hidden, strict=True)]
    assert torch.equal(*logits)
    for output in logits:
        output.float().square().sum().backward()
    assert hidden[0].grad is not None
    assert hidden[1].grad is not None
    torch.testing.assert_close(hidden[0].grad, hidden[1].grad)


def test_the_forward_pass_keeps_no_unpacked_weight_for_the_backward_pass(int4: Path) -> None:
    layer = loading.load_nf4(int4, dtype="bfloat16").get_submodule("model.layers.0.mlp.up_proj")
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert not any(tensor.numel() >= layer.in_features * layer.out_features for tensor in saved)


def test_config_json_says_what_another_reader_needs(int4: Path) -> None:
    document = json.loads((int4 / "config.json").read_text())
    assert document["quantization_config"] == {
        "quant_method": "qlora-retrain", "format": "int4", "compute_dtype": "bfloat16", "group_size": 32,
    }  # fmt: skip
    assert base_formats.from_folder(int4) == Int4("bfloat16")
    stored = load_file(int4 / "model.safetensors")
    layer = {name: (t.dtype, tuple(t.shape)) for name, t in stored.items() if "layers.0.mlp.down_proj" in name}
    assert layer == {
        "model.layers.0.mlp.down_proj.weight": (torch.uint8, (64, 64)),
        "model.layers.0.mlp.down_proj.scales": (torch.float16, (64, 4)),
        "model.layers.0.mlp.down_proj.minima": (torch.float16, (64, 4)),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "int4"}, "config.json: quantization_config has no 'compute_dtype'"),
        ({"format": "nf4", "compute_dtype": "bfloat16"}, "another quantization than"),
        ({"format": "int5", "compute_dtype": "bfloat16"}, "another quantization than"),
    ],
)
def test_a_config_of_no_format_is_refused(settings: dict[str, str], message: str) -> None:
    document = {"quantization_config": {"quant_method": "qlora-retrain", **settings}}
    with pytest.raises(UsageError, match=message):
        base_formats.from_model_config(document, "base_nf4")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({"scales": t["scales"][:, :1].contiguous()}), "do not fit its config.json"),
        (lambda t: t.update({"weight": t["weight"][:-1].contiguous()}), "do not fit its config.json"),
        (lambda t: t.pop("minima"), "1 weights are missing, e.g. .*minima"),
    ],
)
def test_a_damaged_folder_is_refused(int4: Path, tmp_path: Path, edit: Any, message: str) -> None:
    folder = Path(shutil.copytree(int4, tmp_path / "base_nf4"))
    tensors, layer = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj."
    parts = {name.removeprefix(layer): tensors.pop(name) for name in list(tensors) if name.startswith(layer)}
    edit(parts)
    tensors |= {layer + name: tensor for name, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=message):
        loading.load_nf4(folder, dtype="bfloat16")


def test_a_base_whose_weights_have_another_shape_than_it_says_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name][:64].contiguous()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"up_proj.weight is \(64, 64\) in the files, and config.json declares"):
        write(base, tmp_path / "base_nf4")
