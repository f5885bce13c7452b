"""`train.modules_to_save`: embeddings and output layer learn whole beside the adapter, resume, ship, and are merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from components.evaluate.step import run as evaluate
from components.merge_adapter import choice, serving_warnings
from components.merge_adapter.lora import LoraAdapter
from components.merge_adapter.merge import merge
from components.merge_adapter.step import run as run_merge
from components.quantize_model.step import run as quantize
from components.train_qlora import adapter, loss
from components.train_qlora.data import IGNORE_INDEX, PaddingCollator
from components.train_qlora.optimizer import AdapterOptimizer
from qlora_retrain.config.merge import MergeConfig
from qlora_retrain.config.sections import EvaluateConfig, QuantizeConfig, TrainConfig
from qlora_retrain.core import signals
from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.lm import loading, memory_model, own_adapter
from qlora_retrain.lm.model_shape import ModelShape
from tests.components.train_qlora.adapted import SETTINGS

BOTH = ["lm_head", "embed_tokens"]


@pytest.fixture(scope="module")
def untied(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an output layer of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("untied")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untied_nf4(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_nf4")
    quantize(QuantizeConfig(), untied, folder)
    return folder


def attached(base: Any, **settings: Any) -> tuple[Any, TrainConfig]:
    config = TrainConfig(**(SETTINGS | {"modules_to_save": BOTH} | settings))
    torch.manual_seed(0)
    model = adapter.attach_new(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, config


def test_their_gradients_are_those_of_plain_autograd(untied_nf4: Path) -> None:
    ours, _ = attached(loading.load_nf4(untied_nf4))
    rows = [{"input_ids": [1, 5, 9, 40 + i, 2], "labels": [IGNORE_INDEX] * 3 + [40 + i, 2]} for i in range(4)]
    batch = PaddingCollator(0)(rows)
    loss.summed_loss(ours.train(), batch).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert len([name for name in gradients if "modules_to_save" in name]) == 2

    ours.zero_grad()
    logits = ours(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:].flatten()
    cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORE_INDEX, reduction="sum").backward()
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_they_ship_with_the_adapter_and_replace_the_bases_weights(
    untied: Path, untied_nf4: Path, tmp_path: Path
) -> None:
    model, config = attached(loading.load_nf4(untied_nf4))
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter.export(model.eval(), folder, config)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        loaded: Any = loading.attach_adapter(loading.load_nf4(untied_nf4), folder)
        theirs = PeftModel.from_pretrained(loading.load_nf4(untied_nf4), str(folder)).eval()
        # They ship in 16 bits.
        for shipped in (loaded, theirs):
            torch.testing.assert_close(shipped(ids).logits, expected, rtol=0.02, atol=0.15)
        with own_adapter.disabled(loaded):
            torch.testing.assert_close(loaded(ids).logits, loading.load_nf4(untied_nf4)(ids).logits)

        (tmp_path / "model").mkdir()
        merge(untied, untied_nf4, folder, tmp_path / "model", dequantized=True, max_shard_gib=5.0)
        merged = loading.load_base(tmp_path / "model", dtype="float32")
        torch.testing.assert_close(merged(ids).logits, loaded(ids).logits, rtol=0.05, atol=0.1)
    weights = load_file(tmp_path / "model/model.safetensors")
    trained = load_file(folder / adapter.WEIGHTS_FILE)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(weights[name], trained[f"base_model.model.{name}"])
    assert any("modules_to_save are not read" in warning for warning in serving_warnings.read_warnings(folder))
    with LoraAdapter(folder) as lora:
        assert sorted(lora.whole) == ["lm_head.weight", "model.embed_tokens.weight"]
    # A weaker or smaller B A would not go with them.
    whole = choice.whole_adapter_where_needed(MergeConfig(), untied_nf4, folder)
    assert (whole.rank, whole.strength) == ("full", "full")


def test_a_run_goes_on_bit_for_bit(step: Any, untied_nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = step("whole"), step("stopped")
    whole.base_nf4 = stopped.base_nf4 = untied_nf4
    settings = {"modules_to_save": ["lm_head"], "max_steps": 5, "precision": "bfloat16"}
    whole(**settings)
    checks = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(signals, "stop_requested", lambda: next(checks) >= 3)
        with pytest.raises(TryAgain):
            stopped(**settings)
    stopped(**settings)
    assert stopped.weights == whole.weights
    trained, base = load_file(whole.adapter / adapter.WEIGHTS_FILE), load_file(untied_nf4 / "model.safetensors")
    assert not torch.equal(trained["base_model.model.lm_head.weight"], base["lm_head.weight"])
    document = json.loads((whole.adapter / adapter.CONFIG_FILE).read_text())
    assert document["modules_to_save"] == ["lm_head"]


@pytest.mark.soak
def test_two_processes_end_with_the_weights_of_one(step: Any, untied_nf4: Path) -> None:
    alone, shared = step("alone"), step("shared")
    alone.base_nf4 = shared.base_nf4 = untied_nf4
    settings = {"modules_to_save": BOTH, "max_steps": 4, "dropout": 0.0, "learning_rate": 1e-3}
    alone(**settings)
    shared(**settings, num_processes=2)
    expected, weights = adapter.load_weights(alone.adapter), adapter.load_weights(shared.adapter)
    assert expected.keys() == weights.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name].float(), tensor.float(), rtol=0.02, atol=1e-3, msg=name)


@pytest.mark.soak
def test_what_was_merged_is_certified(
    untied: Path, untied_nf4: Path, tmp_path: Path, write_dataset: Any, write_reference: Any
) -> None:
    model, config = attached(loading.load_nf4(untied_nf4))
    for name in ("adapter", "evaluation", "reference", "model"):
        (tmp_path / name).mkdir()
    adapter.export(model, tmp_path / "adapter", config)
    write_reference(tmp_path / "reference")
    folders = {"dataset": write_dataset(tmp_path / "dataset"), "base_model": untied, "base_nf4": untied_nf4}
    folders |= {"adapter": tmp_path / "adapter", "reference_data": tmp_path / "reference"}
    folders["evaluation"] = tmp_path / "evaluation"
    rules = EvaluateConfig(allow_first_release=True, bootstrap_samples=200, device="cpu")
    evaluate(rules, **folders, champion=None, anchor=None, golden_data=None)
    run_merge(
        MergeConfig(device="cpu", base="dequantized", exports=["bf16", "nf4"]), **folders, model=tmp_path / "model"
    )
    certificate = json.loads((tmp_path / "model/certificate.json").read_text())
    losses = {name: form["loss"] for name, form in certificate["forms"]["certification"].items()}
    assert losses["dequantized"] == pytest.approx(losses["live"], abs=0.02)
    assert (certificate["rank"], certificate["strength"]) == (4, 1.0)


def test_shared_weights_and_other_names_are_refused(nf4: Path, untied_nf4: Path) -> None:
    with pytest.raises(UsageError, match="embed_tokens and lm_head of LlamaForCausalLM share one weight"):
        attached(loading.load_nf4(nf4))
    with pytest.raises(UsageError, match="q_proj is none of embed_tokens and lm_head"):
        attached(loading.load_nf4(untied_nf4), modules_to_save=["q_proj"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "adalora"}, "with method: adalora they cannot"),
        ({"method": "full"}, "with method: full they cannot"),
        ({"parallel": "fsdp", "num_processes": 2}, "with parallel: fsdp each process has a part of the base"),
    ],
)
def test_settings_that_do_not_go_with_them_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(modules_to_save=BOTH, **settings)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_planner_counts_them(untied_nf4: Path, precision: str) -> None:
    base = loading.load_nf4(untied_nf4, dtype=precision)
    model, config = attached(base, precision=precision, kernels="torch")
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = AdapterOptimizer(config, trained)
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1e-4)
    states = optimizer.state()
    masters = sum(tensor.nbytes for name, tensor in states.items() if name.endswith(".master"))
    memory = memory_model.estimate(
        ModelShape.from_config(model.config.to_dict()),
        memory_model.Settings.from_sections(config.model_dump(), QuantizeConfig().model_dump()),
        memory_model.MicroBatch(4, 9),
    )
    assert memory.adapter == sum(p.nbytes for _, p in trained) + masters
    assert memory.optimizer == pytest.approx(sum(t.nbytes for t in states.values()) - masters, rel=0.01)


def test_an_output_layer_of_another_name_in_the_files_is_merged(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    base, nf4 = tmp_path / "base", tmp_path / "nf4"
    shutil.copytree(tiny_model, base)
    config = GPTNeoXConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(base)
    assert "embed_out.weight" in load_file(base / "model.safetensors")
    quantize(QuantizeConfig(), base, nf4)

    model, settings = attached(loading.load_nf4(nf4), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    for name in ("adapter", "model"):
        (tmp_path / name).mkdir()
    adapter.export(model, tmp_path / "adapter", settings)
    merge(base, nf4, tmp_path / "adapter", tmp_path / "model", dequantized=True, max_shard_gib=5.0)
    merged, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", base))
    expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(merged["embed_out.weight"], expected)
    assert not torch.equal(merged["embed_out.weight"], original["embed_out.weight"])
