"""LoRA-XS, LoftQ and LQ-LoRA start from the original weights: by their definitions, computed a second way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Module

from components.merge_adapter.merge import merge
from components.quantize_model.step import run as quantize
from components.train_qlora import adapter
from components.train_qlora.methods import method_of
from qlora_retrain.config.quantize import AdapterStart, QuantizeConfig
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import adapter_start, base_formats, loading
from qlora_retrain.lm.low_rank import top_singular_triplets
from tests.components.train_qlora.adapted import SETTINGS

IDS = torch.arange(3, 27).view(2, 12)
LAYER = "model.layers.1.mlp.down_proj"


def attached(base: Path, method: str, **settings):
    """Attach a new adapter of the method to a base that computes in fp32."""
    method = method_of(TrainConfig(**(SETTINGS | {"method": method} | settings)))
    model = adapter.attach_new(loading.load_nf4(base), method.config, method, adapter_start.read(base))
    return model, method


def original_weight(tiny_model: Path) -> torch.Tensor:
    return loading.load_base(tiny_model, dtype="float32").get_submodule(LAYER).weight.data


def dequantized_weight(base: Path) -> torch.Tensor:
    module: Module = loading.load_nf4(base, dtype="bfloat16").get_submodule(LAYER)
    return base_formats.layer_weight(module).float()


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (30, 30)])
def test_the_largest_triplets_are_those_of_the_whole_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = top_singular_triplets(matrix, 5)
    u, s, vt = torch.linalg.svd(matrix.double())
    torch.testing.assert_close(values, s[:5].float(), rtol=1e-5, atol=0)
    torch.testing.assert_close((left * values) @ right, ((u[:, :5] * s[:5]) @ vt[:5]).float(), rtol=1e-4, atol=1e-5)


def test_lora_xs_learns_between_the_largest_singular_vectors(base_of, tiny_model) -> None:
    model, method = attached(base_of("lora-xs"), "lora-xs")
    u, s, vt = torch.linalg.svd(original_weight(tiny_model))
    layer = model.base_model.model.get_submodule(LAYER)
    a, b = adapter_start.read(base_of("lora-xs"))[LAYER]
    torch.testing.assert_close(b @ a, (u[:, :4] * s[:4]) @ vt[:4], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-5)
    assert torch.equal(layer.lora_A["default"].weight, a)

    # Nothing but R learns: rank x rank numbers a layer.
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {tuple(p.shape) for p in trained.values()} == {(4, 4)}
    assert adapter.trainable_by_layer(model)[0] == ("down_proj", 2, 32)
    with torch.no_grad():
        before, plain = model(IDS).logits, loading.load_nf4(base_of("lora-xs"))(IDS).logits
        torch.testing.assert_close(before, plain, rtol=0, atol=1e-2)
        for parameter in trained.values():
            parameter.copy_(torch.eye(4))
        assert (model(IDS).logits - plain).abs().max() > 0.1
    assert {tuple(tensor.shape) for tensor in method.beside({"R": torch.eye(4)}).values()} == {(4, 4)}
    scaled_a, scaled_b = method.to_lora({"A": a, "B": b, "R": torch.eye(4)}, method.scale(layer))
    torch.testing.assert_close(scaled_b @ scaled_a, 2 * b @ a)


def test_loftq_starts_nearer_to_the_original_than_the_4_bit_base(base_of, tiny_model, nf4) -> None:
    weight, plain = original_weight(tiny_model), dequantized_weight(nf4)
    errors = {}
    for iterations in (1, 5):
        base = base_of("loftq", iterations)
        a, b = adapter_start.read(base)[LAYER]
        errors[iterations] = (weight - dequantized_weight(base) - b @ a).norm().item()
    assert errors[5] < errors[1] < (weight - plain).norm().item()

    # One iteration leaves the base as it is, and the start is the best of its rank: a second way.
    assert torch.equal(dequantized_weight(base_of("loftq", 1)), plain)
    assert errors[1] == pytest.approx(torch.linalg.svdvals(weight - plain)[4:].norm().item(), rel=1e-3)

    # quantization.json says both errors over all layers.
    document = json.loads((base_of("loftq") / "quantization.json").read_text())
    assert 0 < document["relative_error_with_start"] < document["relative_error_without_start"]
    assert document["relative_error_without_start"] == pytest.approx(
        json.loads((nf4 / "quantization.json").read_text())["relative_error"], rel=1e-3
    )


@pytest.mark.parametrize("iterations", [1, 5])
def test_lq_lora_keeps_the_best_of_its_alternation(base_of, tiny_model, iterations: int) -> None:
    # A second way: by whole decompositions, and all rounds at once.
    base, weight = base_of("lq-lora", iterations), original_weight(tiny_model)
    layout = base_formats.from_folder(base).layout(LAYER, *weight.shape)
    rounds, stored = [], torch.zeros_like(weight)
    for _ in range(iterations):
        u, s, vt = torch.linalg.svd(weight - stored, full_matrices=False)
        low_rank = (u[:, :4] * s[:4]) @ vt[:4]
        stored = layout.unpack(layout.pack((weight - low_rank).bfloat16())).float()
        rounds.append((weight - low_rank - stored).norm().item())
    rises = [i for i in range(1, iterations) if rounds[i] >= rounds[i - 1]]
    best = rounds[rises[0] - 1] if rises else rounds[-1]

    a, b = adapter_start.read(base)[LAYER]
    assert (weight - dequantized_weight(base) - b @ a).norm().item() == pytest.approx(best, rel=1e-2)
    plain = layout.unpack(layout.pack(weight.bfloat16())).float()
    assert best < (weight - plain).norm().item()


@pytest.mark.parametrize("method", ["loftq", "lq-lora"])
def test_the_first_logits_are_those_of_the_base_with_the_correction(base_of, method: str) -> None:
    base = base_of(method)
    model, _ = attached(base, method, alpha=12.0)
    reference = loading.load_nf4(base)
    with torch.no_grad():
        for name, (a, b) in adapter_start.read(base).items():
            reference.get_submodule(name).weight.data += b @ a
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "dequantized"), [("loftq", True), ("loftq", False), ("lq-lora", False)])
def test_the_correction_does_not_count_twice_in_the_original_base(
    base_of, tiny_model, tmp_path, method: str, dequantized: bool
) -> None:
    model, _ = attached(base_of(method), method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    config = TrainConfig(**(SETTINGS | {"method": method}))
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    adapter.export(model, tmp_path / "adapter", config)
    merge(
        tiny_model,
        base_of(method),
        tmp_path / "adapter",
        tmp_path / "merged",
        dequantized=dequantized,
        max_shard_gib=1.0,
    )
    layer = model.base_model.model.get_submodule(LAYER)
    a, b = layer.lora_A["default"].weight.data, 2 * layer.lora_B["default"].weight.data
    a0, b0 = adapter_start.read(base_of(method))[LAYER]
    if dequantized:
        expected = dequantized_weight(base_of(method)) + b @ a
    else:
        expected = original_weight(tiny_model) + b @ a - b0 @ a0
    merged = loading.load_base(tmp_path / "merged", dtype="float32").get_submodule(LAYER).weight.data
    torch.testing.assert_close(merged, expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("method", ["lora-xs", "loftq", "lq-lora"])
def test_a_base_without_a_start_is_refused(nf4, method: str) -> None:
    with pytest.raises(IntegrityError, match="needs a start of rank 4 for every adapted layer, and the base has no"):
        attached(nf4, method)


def test_a_start_of_another_rank_is_refused(base_of) -> None:
    with pytest.raises(IntegrityError, match="and the base has one of rank 4 for one of them; make a new plan"):
        attached(base_of("loftq"), "loftq", rank=2)


@pytest.mark.parametrize("method", ["lora-xs", "loftq", "lq-lora"])
def test_a_start_of_weights_that_are_not_finite_is_refused_with_the_weights_name(
    tiny_model, tmp_path, method: str
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    start = AdapterStart(method=method, rank=2, target_modules="all-linear", iterations=2)
    with pytest.raises(IntegrityError, match=r"base_model: model\.layers\.0\.mlp\.up_proj\.weight holds numbers that"):
        quantize(QuantizeConfig(adapter_start=start), base, tmp_path / "stored")


def test_more_ranks_than_singular_vectors_are_refused_before_a_weight_is_read(tiny_model, tmp_path) -> None:
    start = AdapterStart(method="lora-xs", rank=33, target_modules="all-linear", iterations=1)
    with pytest.raises(UsageError, match=r"train.rank: 33, .*k_proj has 32; set train.rank to 32 or less"):
        quantize(QuantizeConfig(adapter_start=start), tiny_model, tmp_path)
