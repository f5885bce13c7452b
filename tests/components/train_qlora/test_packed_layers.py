"""Adapters over packed layers of our own: every method computes as it does over plain layers with the same weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from components.quantize_model.step import run as quantize
from components.train_qlora import adapter
from components.train_qlora.methods import METHODS, Lora, method_of
from components.train_qlora.methods.qa_lora import QaLora
from qlora_retrain.config.sections import AdapterStart, QuantizeConfig, TrainConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import adapter_start, base_formats, loading
from tests.components.train_qlora.adapted import SETTINGS

IDS = torch.arange(24).view(2, 12)
WITH_START = ("lora-xs", "loftq", "lq-lora")


@pytest.fixture(scope="module")
def int4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the tiny model in `int4`, with the start of a method beside it where there is one."""
    folders: dict[str, Path] = {}

    def base(method: str) -> Path:
        name = method if method in WITH_START else ""
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("int4")
            start = AdapterStart(method=method, rank=4, target_modules="all-linear", iterations=2) if name else None
            quantize(QuantizeConfig(format="int4", adapter_start=start), tiny_model, folders[name])
        return folders[name]

    return base


def attach(folder: Path, config: TrainConfig, *, is_packed: bool) -> Any:
    """Attach an adapter with numbers in it, over packed layers or plain ones with their values in bf16."""
    model = loading.load_nf4(folder, dtype="bfloat16")
    layers = [(name, m) for name, m in model.named_modules() if base_formats.Int4.is_packed_layer(m)]
    assert len(layers) == 14
    for name, layer in layers:
        if not is_packed:
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = torch.nn.Parameter(layer.unpacked().bfloat16(), requires_grad=False)
            model.set_submodule(name, plain)
    torch.manual_seed(0)
    attached = adapter.attach_new(model, config, start=adapter_start.read(folder))
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if ".lora_A" in name:
                parameter.copy_(parameter.bfloat16())  # as PEFT rounds it over plain layers
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return attached


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if issubclass(method, Lora)])
def test_logits_and_gradients_are_those_over_plain_layers(int4: Any, method: str) -> None:
    config = TrainConfig(**(SETTINGS | {"method": method, "precision": "bfloat16"}))
    gradients = []
    for is_packed in (True, False):
        model = attach(int4(method), config, is_packed=is_packed)
        logits = model(IDS).logits
        logits.float().square().mean().backward()
        gradients.append({"logits": logits, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}})
    packed, plain = gradients
    assert packed.keys() == plain.keys()
    for name, gradient in plain.items():
        # DoRA's lengths of rows are those of the weights in fp32 here, and in bf16 there.
        difference = float((packed[name] - gradient).detach().norm() / gradient.detach().norm())
        assert difference < (0.1 if method == "dora" else 1e-6), name


def test_layers_without_an_adapter_pass_the_gradient_on(int4: Any) -> None:
    config = TrainConfig(**(SETTINGS | {"target_modules": ["q_proj"], "precision": "bfloat16"}))
    gradients = []
    for is_packed in (True, False):
        model = attach(int4("lora"), config, is_packed=is_packed)
        model(IDS).logits.float().square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for packed, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, plain, rtol=0, atol=1e-6)


def test_qa_lora_adds_one_number_to_all_weights_of_a_group(int4: Any) -> None:
    config = TrainConfig(**(SETTINGS | {"method": "qa-lora"}))
    method = method_of(config)
    assert isinstance(method, QaLora)
    model = adapter.attach_new(loading.load_nf4(int4("qa-lora")), config, method)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    a = layer.lora_A["default"].weight.detach()
    assert a.shape == (4, 4)  # 128 inputs are 4 groups
    # The paper's start: that of a layer with 4 inputs.
    assert float(a.abs().max()) <= 1 / math.sqrt(4)
    assert float(a.abs().max()) > 1 / math.sqrt(128)

    x = torch.randn(5, 128)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        sums = x.view(5, 4, 32).sum(-1)
        expected = layer.base_layer(x) + 2 * sums @ a.T @ layer.lora_B["default"].weight.T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)


def test_qa_lora_refuses_a_layer_whose_inputs_do_not_fill_groups() -> None:
    config = TrainConfig(**(SETTINGS | {"method": "qa-lora"}))
    layer = torch.nn.Module()
    layer.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(80, 4, bias=False)})
    with pytest.raises(UsageError, match=r"qa-lora needs layers whose inputs fill groups of 32, and one has 80 inputs"):
        method_of(config).extend(layer, None)  # type: ignore[attr-defined]
