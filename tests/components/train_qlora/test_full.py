"""Full fine-tuning: every weight learns as plain torch would have it, a resumed run ends with the same bytes."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from components.quantize_model.step import run as quantize
from components.train_qlora import adapter, checkpoint, loss, preflight
from components.train_qlora.data import IGNORE_INDEX, PaddingCollator
from components.train_qlora.optimizer import AdapterOptimizer
from qlora_retrain.config.sections import QuantizeConfig, TrainConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import loading
from tests.components.train_qlora.conftest import SMALL

FULL: dict[str, Any] = {"method": "full", "alpha": None, "dropout": 0.0, "learning_rate": 1e-3}
SETTINGS = SMALL | FULL


@pytest.fixture(scope="module")
def sixteen_bits(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as it is."""
    folder = tmp_path_factory.mktemp("base_nf4")
    quantize(QuantizeConfig(format="none"), tiny_model, folder)
    return folder


@pytest.fixture
def full_step(step: Any, sixteen_bits: Path) -> Any:
    """Make a step over the 16-bit base."""

    def make(name: str = "run") -> Any:
        made_step = step(name)
        made_step.base_nf4 = sixteen_bits
        return made_step

    return make


@pytest.fixture
def batch(chats: Any, tiny_model: Path) -> dict[str, torch.Tensor]:
    rows = [{"input_ids": [1, 5 + i, 9, 40 + i, 2, 7], "labels": [IGNORE_INDEX] * 3 + [40 + i, 2, 7]} for i in range(4)]
    return PaddingCollator(0)(rows)


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_every_weight_has_the_gradient_of_plain_torch(sixteen_bits: Path, batch: Any, is_tied: bool) -> None:
    plain: Any = loading.load_nf4(sixteen_bits, dtype="float32")
    if not is_tied:
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    model = adapter.attach_new(copy.deepcopy(plain), TrainConfig(**SETTINGS)).train()
    loss.summed_loss(model, batch).backward()

    logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum").backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert expected.keys() == gradients.keys()
    assert ("lm_head.weight" in expected) != is_tied
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_run_learns_and_writes_a_model_that_computes_what_was_trained(full_step: Any, sixteen_bits: Path) -> None:
    run = full_step()
    numbers = run(**FULL | {"learning_rate": 3e-3, "max_steps": 40}, optimizer="paged_adamw_8bit", num_evals=2)
    assert numbers["eval_loss"] < 0.5
    assert loading.has_all_weights(run.adapter)
    trained, base = load_file(run.adapter / "model.safetensors"), load_file(sixteen_bits / "model.safetensors")
    assert trained.keys() == base.keys()
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}
    assert [name for name, tensor in trained.items() if torch.equal(tensor, base[name])] == []
    assert numbers["trainable_parameters"] == sum(tensor.numel() for tensor in base.values())
    document = json.loads((run.adapter / "config.json").read_text())
    assert document["dtype"] == "bfloat16"
    assert str(sixteen_bits) not in json.dumps(document)
    model = loading.load_trained(sixteen_bits, run.adapter)
    assert model.dtype == torch.float32
    assert not model.training


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_bytes_of_one_that_nothing_stopped(
    full_step: Any, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    settings = FULL | {"precision": precision, "max_steps": 5, "num_evals": 2, "checkpoint_minutes": 1e-9}
    monkeypatch.setattr(checkpoint, "MAX_CHECKPOINTS", 5)
    run = full_step()
    run(**settings)
    whole = (run.adapter / "model.safetensors").read_bytes()
    losses = [entry["loss"] for entry in map(json.loads, (run.adapter / "loss.jsonl").read_text().split("\n")[:-1])]
    for number in (4, 5):
        shutil.rmtree(run.scratch / f"checkpoint-{number}")
    numbers = run(**settings)
    assert numbers["resumed_at"] == 3
    assert (run.adapter / "model.safetensors").read_bytes() == whole
    resumed = [entry["loss"] for entry in map(json.loads, (run.adapter / "loss.jsonl").read_text().split("\n")[:-1])]
    assert resumed == losses


def test_16_bit_weights_move_by_updates_that_are_smaller_than_their_rounding() -> None:
    """A weight of 1 has steps of 2^-8 in bf16; 40 updates of a twentieth of that add up only in the master."""
    weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    config = TrainConfig(**SETTINGS | {"precision": "bfloat16"})
    optimizer = AdapterOptimizer(config, [("weight", weight)])
    optimizer.begin()
    for _ in range(40):
        (weight.float() * 3.0).sum().backward()
        assert weight.grad is None  # it is the master's already
        optimizer.collect_gradients()
        assert torch.equal(optimizer.parameters["weight"].grad, torch.full((64,), 3.0))
        optimizer.step(0.05 * 2**-8)
    assert float(optimizer.parameters["weight"].detach().mean()) == pytest.approx(1 - 40 * 0.05 * 2**-8, rel=1e-4)
    assert float(weight.detach()[0]) == 1 - 2 * 2**-8

    # The state has the master, and a new optimizer goes on from it.
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    assert state.keys() == optimizer.empty_state().keys()
    twin = AdapterOptimizer(config, [("weight", torch.nn.Parameter(weight.detach().clone()))])
    twin.load_state(state, 40)
    assert torch.equal(twin.parameters["weight"], optimizer.parameters["weight"])


def test_a_4_bit_base_has_no_weights_to_train(step: Any) -> None:
    with pytest.raises(UsageError, match=r"base_nf4 has 4\.13 bits a weight; set quantize\.format: none, or train"):
        step()(**FULL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel": "fsdp", "num_processes": 2}, "parallel: fsdp shards a frozen base"),
        ({"target_modules": "attention"}, "has no adapter"),
        ({"alpha": 8.0}, "has no adapter"),
    ],
)
def test_settings_of_an_adapter_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(method="full", **settings)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_preflight_leaves_no_trace(
    full_step: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, precision: str
) -> None:
    settings = FULL | {"precision": precision, "max_steps": 3}
    without, run = full_step("without"), full_step("with")
    without(**settings)
    monkeypatch.setattr(preflight, "MAX_TOKENS_FRACTION", 1e6)
    run(**settings)
    assert "preflight: 8 rows, loss" in capsys.readouterr().out
    assert (run.adapter / "model.safetensors").read_bytes() == (without.adapter / "model.safetensors").read_bytes()


def test_recomputed_layers_and_smaller_micro_batches_end_with_the_same_weights(full_step: Any) -> None:
    settings = FULL | {"precision": "float32", "max_steps": 3}
    runs = [full_step(name) for name in ("plain", "recomputed", "auto")]
    for run, change in zip(runs, ({}, {"gradient_checkpointing": 1}, {"micro_batch_size": "auto"}), strict=True):
        run(**settings | change)
    plain, recomputed, auto = (load_file(run.adapter / "model.safetensors") for run in runs)
    for name, tensor in plain.items():
        assert torch.equal(recomputed[name], tensor), name
        torch.testing.assert_close(auto[name].float(), tensor.float(), rtol=0.01, atol=1e-3, msg=name)


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(full_step: Any) -> None:
    alone, shared = full_step("alone"), full_step("shared")
    alone(**FULL, max_steps=3)
    shared(**FULL, max_steps=3, num_processes=2)
    expected, weights = (load_file(run.adapter / "model.safetensors") for run in (alone, shared))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name].float(), tensor.float(), rtol=0.02, atol=2e-3, msg=name)


def test_the_planner_counts_what_torch_has(sixteen_bits: Path, batch: Any) -> None:
    from qlora_retrain.lm import memory_model
    from qlora_retrain.lm.memory_model import MicroBatch, Settings
    from qlora_retrain.lm.model_shape import ModelShape

    for optimizer_name, precision in (("paged_adamw_8bit", "bfloat16"), ("paged_adamw_32bit", "float32")):
        config = TrainConfig(**SETTINGS | {"optimizer": optimizer_name, "precision": precision, "kernels": "torch"})
        model: Any = adapter.attach_new(loading.load_nf4(sixteen_bits, dtype=precision), config).train()
        optimizer = AdapterOptimizer(config, model.named_parameters())
        loss.summed_loss(model, batch).backward()
        optimizer.collect_gradients()
        gradients = sum(parameter.grad.nbytes for parameter in optimizer.parameters.values())
        optimizer.step(1e-4)
        masters = sum(tensor.nbytes for name, tensor in optimizer.state().items() if name.endswith(".master"))
        states = sum(tensor.nbytes for tensor in optimizer.state().values()) - masters

        shape = ModelShape.from_config(model.config.to_dict())
        settings = Settings.from_sections(config.model_dump(), QuantizeConfig(format="none").model_dump())
        memory = memory_model.estimate(shape, settings, MicroBatch(4, 6))
        assert memory.weights == sum(parameter.nbytes for parameter in model.parameters())
        assert (memory.adapter, memory.gradients) == (masters, gradients)
        assert memory.optimizer == pytest.approx(states, rel=0.01)

    # 16 bytes a weight with 32-bit states, and about 12 with 8-bit ones and masters (2 + 4 + 4 + 2).
    seven_billion = dataclasses.replace(shape, width=4096, mlp_width=11008, layers=32, vocabulary=32000)
    assert memory_model.estimate(seven_billion, settings, MicroBatch(1, 8)).static == pytest.approx(
        16 * seven_billion.weights, rel=0.01
    )


@pytest.mark.slow
def test_shards_of_a_16_bit_base_give_the_adapter_of_whole_ones(full_step: Any) -> None:
    settings = {"max_steps": 3, "num_processes": 2, "dropout": 0.0}
    whole, sharded = full_step("ddp"), full_step("fsdp")
    whole(**settings)
    sharded(**settings, parallel="fsdp")
    expected, weights = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, sharded))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
