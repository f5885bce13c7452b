"""Training over the formats with layers of our own: packed weights in 16 bits give what unpacked ones give in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components.quantize_model.step import run as quantize
from components.train_qlora import adapter
from components.train_qlora.methods import method_of
from qlora_retrain.config.quantize import QuantizeConfig
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import base_formats, loading
from tests.components.train_qlora.adapted import SETTINGS, adapted

IDS = torch.arange(24).view(2, 12)
LAYER = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module", params=["nf4-shifted", "mixed"])
def base(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in this format."""
    folder = tmp_path_factory.mktemp(request.param)
    quantize(QuantizeConfig(format=request.param), tiny_model, folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "dora", "ir-qlora"])
def test_gradients_over_packed_weights_are_those_over_the_same_values_in_fp32(base: Path, method: str) -> None:
    plain, config = adapted(base, method)
    config = TrainConfig(**(SETTINGS | {"method": method, "precision": "bfloat16"}))
    torch.manual_seed(0)
    packed = adapter.attach_new(loading.load_nf4(base, dtype="bfloat16"), config, method_of(config))
    layer = packed.get_submodule(LAYER)
    assert base_formats.from_folder(base).is_packed_layer(layer.base_layer)
    assert not layer.base_layer.weight.requires_grad
    packed.load_state_dict({n: p for n, p in plain.state_dict().items() if ".lora_" in n}, strict=False)

    grads = []
    for model in (plain, packed):
        model(IDS).logits.float().square().mean().backward()
        grads.append({n: p.grad.float() for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    error = sum((grads[0][n] - g).square().sum() for n, g in grads[1].items())
    assert (error / sum(g.square().sum() for g in grads[0].values())) ** 0.5 < 0.05


def test_an_adapter_is_scored_over_packed_weights(base: Path, tmp_path: Path) -> None:
    model, config = adapted(base, "lora")
    adapter.export(model.eval(), tmp_path, config)
    with torch.no_grad():
        expected = model(IDS).logits
        scored = loading.load_trained(base, tmp_path, dtype="bfloat16")(IDS).logits
    assert (scored.float() - expected).norm() / expected.norm() < 0.03
