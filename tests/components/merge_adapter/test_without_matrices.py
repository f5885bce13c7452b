"""IA3 merges as PEFT merges it; what cannot be merged is certified as an adapter alone, and then is a champion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from components.evaluate import intruders
from components.evaluate.step import run as evaluate
from components.merge_adapter import serving_warnings
from components.merge_adapter.merge import merge
from components.merge_adapter.step import run
from qlora_retrain.config.sections import MergeConfig
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.evaluation import scoring
from qlora_retrain.lm import chat, loading, served_model
from tests.components.merge_adapter.conftest import RULES
from tests.components.train_qlora.adapted import export_random

ALONE = ("prompt", "prefix", "bottleneck")


@pytest.fixture(scope="module")
def with_biases(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with biases of queries, keys and values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("with-biases")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(tiny_model)
    config.attention_bias = True
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_ia3_merges_rows_columns_and_biases_as_peft_does(with_biases: Path, tmp_path: Path) -> None:
    adapter = export_random(loading.load_base(with_biases), "ia3", tmp_path / "adapter", size=0.3)
    (tmp_path / "model").mkdir()
    stats = merge(with_biases, with_biases, adapter, tmp_path / "model", dequantized=False, max_shard_gib=5.0)
    assert stats.modules == 6  # keys, values and the MLP's last layer, of two layers
    peft = PeftModel.from_pretrained(loading.load_base(with_biases, dtype="float32"), str(adapter))
    expected = peft.merge_and_unload().state_dict()
    merged, base = load_file(tmp_path / "model/model.safetensors"), load_file(with_biases / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert {name.split(".")[-2] + "." + name.split(".")[-1] for name in changed} == {
        "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "down_proj.weight"
    }  # fmt: skip
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name].to(torch.bfloat16), rtol=0, atol=0, msg=name)


def test_a_scale_of_another_shape_or_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    adapter = export_random(loading.load_base(tiny_model), "ia3", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "k_proj" in name)
    (tmp_path / "model").mkdir()
    for changed, message in (
        ({**tensors, name: torch.ones(7, 1)}, r"its scale is \(7, 1\), and \(32, 1\) is expected"),
        ({**tensors, "base_model.model.x.lora_A": torch.ones(2, 1)}, "is no scale of IA3"),
    ):
        save_file(changed, file)
        with pytest.raises(IntegrityError, match=message):
            merge(tiny_model, tiny_model, adapter, tmp_path / "model", dequantized=False, max_shard_gib=5.0)


def test_intruders_of_scales_are_counted_and_other_adapters_have_none(tiny_model: Path, tmp_path: Path) -> None:
    for method in ("ia3", *ALONE):
        adapter = export_random(loading.load_base(tiny_model), method, tmp_path / method, size=0.5)
        model: Any = loading.attach_adapter(loading.load_base(tiny_model, dtype="float32"), adapter)
        layers = intruders.count_intruders(model, top_k=5, epsilon=0.9)
        assert len(layers) == (6 if method == "ia3" else 0)
        assert serving_warnings.read_warnings(adapter)[0].startswith("vLLM, TGI, llama.cpp: adapters of the kind")
    expected = PeftModel.from_pretrained(loading.load_base(tiny_model, dtype="float32"), str(tmp_path / "ia3"))
    merged = dict(expected.merge_and_unload().named_modules())
    ia3: Any = loading.attach_adapter(loading.load_base(tiny_model, dtype="float32"), tmp_path / "ia3")
    for name, _, tuned in intruders.weight_pairs(ia3):
        torch.testing.assert_close(tuned, merged[name].weight)


# In CI the one that ships in the fewest files; the others differ in how they load.
@pytest.mark.parametrize(
    "method", ["prompt", *(pytest.param(m, marks=pytest.mark.soak) for m in ALONE if m != "prompt")]
)
def test_an_adapter_alone_is_certified_over_either_base_and_then_compared_with_as_a_champion(
    inputs: dict[str, Path], tmp_path: Path, method: str
) -> None:
    base_nf4, base_model, model = inputs["base_nf4"], inputs["base_model"], inputs["model"]
    inputs["adapter"] = export_random(loading.load_nf4(base_nf4), method, tmp_path / "version/adapter")
    data = {"dataset": inputs["dataset"], "base_model": base_model, "base_nf4": base_nf4, "adapter": inputs["adapter"]}
    none = {"champion": None, "anchor": None, "golden_data": None, "reference_data": inputs["reference_data"]}
    shutil.rmtree(inputs["evaluation"])
    inputs["evaluation"].mkdir()
    evaluate(RULES, **data, **none, evaluation=inputs["evaluation"])

    report = run(MergeConfig(device="cpu", base="measured", min_prompts=18), **inputs)
    document = json.loads((model / "certificate.json").read_text())
    assert document["rank"] is None
    assert list(document["exports"]) == ["adapter"]
    assert report.numbers["modules"] == 0
    assert "<h1>Adapter alone: " in (model / "report.html").read_text()
    rule = next(rule for rule in document["rules"] if rule["name"] == "merge_cost")
    assert "lost over this base" in json.dumps(rule)
    # Nothing was merged, so over the base of the training it computes what was evaluated.
    forms = document["forms"]["selection"]
    assert forms["dequantized"]["loss"] == pytest.approx(forms["live"]["loss"], abs=1e-6)
    assert forms["original"]["loss"] != pytest.approx(forms["live"]["loss"], abs=1e-4)

    # No weights, and all that a consumer needs beside the base and the adapter.
    names = {path.name for path in model.rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith(".safetensors")]
    assert names >= {"base.json", "config.json", "generation_config.json", "tokenizer.json", "chat_format.json"}
    reference = served_model.BaseReference.read(model)
    assert reference is not None
    assert reference.form == document["base"]

    # As a champion it is scored as it was certified.
    shutil.copytree(model, tmp_path / "version/model")
    again = tmp_path / "again"
    again.mkdir()
    evaluate(RULES, **data, **{**none, "champion": tmp_path / "version"}, evaluation=again)
    scores = scoring.read_scores(again / "scores.jsonl")
    loss = sum(s.loss_nats for s in scores["champion"] if s.suite == "eval")
    tokens = sum(s.tokens for s in scores["champion"] if s.suite == "eval")
    halves = [document["forms"][half][document["form"]]["loss"] for half in ("selection", "certification")]
    assert loss / tokens == pytest.approx(sum(halves) / 2, rel=0.05)


def test_a_base_that_is_packed_anew_computes_what_the_stored_one_does(
    tiny_model: Path, tiny_nf4: Path, tmp_path: Path
) -> None:
    adapter = export_random(loading.load_nf4(tiny_nf4), "bottleneck", tmp_path / "adapter")
    reference = served_model.BaseReference.from_folders("dequantized", tiny_model, tiny_nf4)
    (tmp_path / "model").mkdir()
    reference.write(tmp_path / "model")
    chat.load_tokenizer(tiny_model).tokenizer.save_pretrained(tmp_path / "model")
    options: Any = {"device": "cpu", "attn_implementation": "eager", "dtype": "float32"}
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        anew, stored = (
            served_model.load(tmp_path / "model", adapter, tiny_model, nf4, **options)(ids).logits
            for nf4 in (None, tiny_nf4)
        )
    assert torch.equal(anew, stored)

    # A base that is not packed has no such form.
    with pytest.raises(UsageError, match=r"set merge\.base: original"):
        served_model.BaseReference.from_folders("dequantized", tiny_model, tiny_model)

    # Another base is refused, and so is a form that nobody can make here.
    changed_base = tmp_path / "other"
    shutil.copytree(tiny_model, changed_base)
    config = json.loads((changed_base / "config.json").read_text())
    (changed_base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(UsageError, match="is an adapter over another base model"):
        served_model.load(tmp_path / "model", adapter, changed_base, None, **options)
