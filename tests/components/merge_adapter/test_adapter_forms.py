"""A cut, weakened or intruder-free adapter is what its formula says, computed a second way from dense matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.merge_adapter import adapter_forms
from components.merge_adapter.lora import LoraAdapter
from components.merge_adapter.merge import merge, open_base
from qlora_retrain.core.errors import UsageError

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 20),
    "model.layers.0.mlp.up_proj": (40, 20),
    "model.layers.0.x": (6, 9),
}
RANK = 8


def write_adapter(folder: Path, method: str = "", has_magnitudes: bool = False, **settings: Any) -> Path:
    """Write a random adapter; its module `x` has fewer features than ranks."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, (num_out, num_in) in SHAPES.items():
        path = f"base_model.model.{name}.lora_"
        tensors[f"{path}A.weight"] = torch.randn(RANK, num_in, generator=generator)
        tensors[f"{path}B.weight"] = torch.randn(num_out, RANK, generator=generator)
        if has_magnitudes:
            tensors[f"{path}magnitude_vector"] = torch.rand(num_out, generator=generator) + 1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "use_dora": has_magnitudes, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if method:
        (folder / "training.json").write_text(json.dumps({"settings": {"method": method}}))
    return folder


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """Return each module's dense delta W in fp64, from the files alone: alpha / rank * B A."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    paths = {name: f"base_model.model.{name}.lora_" for name in SHAPES}
    return {
        name: scale * tensors[f"{path}B.weight"].double() @ tensors[f"{path}A.weight"].double()
        for name, path in paths.items()
    }


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 20}, {"use_rslora": True, "lora_alpha": 5}])
def test_a_cut_is_the_best_approximation_of_its_rank(tmp_path: Path, rank: int, settings: dict[str, Any]) -> None:
    source = write_adapter(tmp_path / "adapter", **settings)
    adapter_forms.cut(source, tmp_path / "cut", rank)
    cut = updates(tmp_path / "cut")
    for name, full in updates(source).items():
        # Eckart and Young: no matrix of this rank is nearer than the one of the largest singular values.
        left, values, right = torch.linalg.svd(full, full_matrices=False)
        best = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
        torch.testing.assert_close(cut[name], best, rtol=0, atol=1e-5 * values[0].item())
        distance = torch.linalg.matrix_norm(cut[name] - full)
        assert distance == pytest.approx(values[rank:].square().sum().sqrt().item(), abs=1e-5 * values[0].item())

    config = json.loads((tmp_path / "cut/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)


def test_the_same_adapter_is_cut_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter")
    files = []
    for name in ("one", "two"):
        adapter_forms.cut(source, tmp_path / name, 3)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("method", ["dylora", "qdylora"])
def test_a_cut_of_dylora_is_the_first_ranks_at_their_scale(tmp_path: Path, method: str) -> None:
    source = write_adapter(tmp_path / "adapter", method)
    adapter_forms.cut(source, tmp_path / "cut", 2)
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "cut/adapter_model.safetensors")
    for name, tensor in before.items():
        # alpha / 8 is folded into B, and rank 2 trained at alpha / 2: four times as much.
        expected = tensor[:2] if "lora_A" in name else 4 * tensor[:, :2]
        assert torch.equal(after[name], expected)


def test_a_rank_that_the_adapter_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"merge\.rank: 9 is more than the adapter has, which is 8"):
        adapter_forms.cut(write_adapter(tmp_path / "adapter"), tmp_path / "cut", 9)


@pytest.mark.parametrize("strength", [0.5, 0.7])
@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 16}, {"use_rslora": True, "lora_alpha": 5}])
def test_a_weakened_adapter_changes_weights_by_that_much_less(
    tmp_path: Path, strength: float, settings: dict[str, Any]
) -> None:
    source = write_adapter(tmp_path / "adapter", **settings)
    adapter_forms.weaken(source, tmp_path / "weak", strength)
    weak = updates(tmp_path / "weak")
    for name, full in updates(source).items():
        # One rounding of B to fp32; a half, at a scale of 1 or 2, needs none.
        is_exact = strength == 0.5 and not settings.get("use_rslora")
        torch.testing.assert_close(weak[name], strength * full, rtol=0, atol=0 if is_exact else 1e-6 * full.abs().max())


def test_layers_of_several_ranks_get_one_rank_and_keep_their_update(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter", rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 9})
    tensors = load_file(source / "adapter_model.safetensors")
    a, b = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")
    tensors[a], tensors[b] = tensors[a][:3].contiguous(), tensors[b][:, :3].contiguous()
    save_file(tensors, source / "adapter_model.safetensors")
    adapter_forms.weaken(source, tmp_path / "weak", 0.5)
    expected = 0.5 * 3 * tensors[b].double() @ tensors[a].double()
    torch.testing.assert_close(updates(tmp_path / "weak")["model.layers.0.self_attn.q_proj"], expected)
    with LoraAdapter(tmp_path / "weak") as lora:
        assert {lora.rank(module) for module in lora.modules} == {8}


def test_magnitudes_stay_where_b_a_is_cut(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter", has_magnitudes=True)
    adapter_forms.cut(source, tmp_path / "cut", 2)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (source, tmp_path / "cut"))
    magnitudes = [name for name in before if name.endswith("magnitude_vector")]
    assert len(magnitudes) == 3
    assert all(torch.equal(before[name], after[name]) for name in magnitudes)
    assert adapter_forms.has_magnitudes(tmp_path / "cut")


def test_an_intruder_is_scaled_down_and_a_layer_without_one_stays_as_it_is(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "adapter")
    tensors = load_file(source / "adapter_model.safetensors")
    intruder = torch.zeros(24)
    intruder[-1] = 30.0  # the base has no direction along the last output
    for name, tensor in tensors.items():
        tensors[name] = 1e-3 * tensor if "lora_B" in name else tensor
        if "q_proj.lora_B" in name:
            tensors[name][:, 0] = intruder
    save_file(tensors, source / "adapter_model.safetensors")
    weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for weight in weights.values():
        # Of different sizes, so that each is a direction of its own.
        size = min(weight.shape) - 1
        weight[range(size), range(size)] = torch.linspace(6, 4, size)

    count = adapter_forms.reduce_intruders(source, tmp_path / "reduced", weights.__getitem__, top_k=1, epsilon=0.5)
    assert count == 1
    before, after = updates(source), updates(tmp_path / "reduced")
    name = "model.layers.0.self_attn.q_proj"
    left, values, right = torch.linalg.svd(weights[name].double() + before[name], full_matrices=False)
    expected = before[name] - 0.25 * values[0] * torch.outer(left[:, 0], right[0])
    # The sum has nine ranks and is cut to eight; the ninth is as small as the other ranks.
    torch.testing.assert_close(after[name], expected, rtol=0, atol=0.02)
    assert (before[name] - after[name]).abs().max() > 5
    torch.testing.assert_close(after["model.layers.0.mlp.up_proj"], before["model.layers.0.mlp.up_proj"])


def test_the_weights_of_modules_are_those_that_are_merged_into(
    tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """An adapter of strength almost zero merges to the weights alone."""
    adapter_forms.weaken(tiny_adapter, tmp_path / "weak", 1e-30)
    for is_dequantized in (True, False):
        folder = tmp_path / f"merged-{is_dequantized}"
        folder.mkdir()
        merge(tiny_model, tiny_nf4, tmp_path / "weak", folder, dequantized=is_dequantized, max_shard_gib=5.0)
        merged = load_file(folder / "model.safetensors")
        with LoraAdapter(tiny_adapter) as lora:
            modules = lora.modules
        with open_base(tiny_model, tiny_nf4, modules, dequantized=is_dequantized) as base:
            for module in modules:
                torch.testing.assert_close(
                    base.module_weight(module).bfloat16(), merged[f"{module}.weight"], rtol=0, atol=1e-29
                )
