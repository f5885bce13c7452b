"""Layers are targets by name, kind or pattern, and may have a rank and an alpha of their own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

from components.train_qlora import adapter
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import loading
from tests.components.train_qlora.adapted import adapted

IDS = torch.arange(3, 27).view(2, 12)
PATTERNS: dict[str, Any] = {
    "rank_pattern": {r"layers\.1\..*\.q_proj": 1, "q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 20.0},
}  # fmt: skip


def adapted_paths(model: Any) -> set[str]:
    return {
        n.split(".lora_A")[0].removeprefix("base_model.model.model.")
        for n, _ in model.named_parameters()
        if "lora_A" in n
    }


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        ("mlp", {f"layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")}),
        (r".*\.layers\.1\.self_attn\.[qv]_proj", {"layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"}),
        (["q_proj"], {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
    ],
)
def test_layers_are_chosen_by_kind_pattern_and_name(nf4, targets: Any, paths: set[str]) -> None:
    model, _ = adapted(nf4, "lora", target_modules=targets)
    assert adapted_paths(model) == paths


def test_ranks_and_alphas_of_single_layers_compute_as_pefts(nf4) -> None:
    ours, _ = adapted(nf4, "lora", alpha=8.0, **PATTERNS)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **PATTERNS)
    theirs = get_peft_model(loading.load_nf4(nf4), settings)
    set_peft_model_state_dict(theirs, adapter.copy_weights(ours))

    ranks = {n: t["A"].shape[0] for n, t in adapter.tensors_by_layer(adapter.copy_weights(ours)).items()}
    assert {name.split("model.")[-1]: rank for name, rank in ranks.items() if "q_proj" in name} == {
        "layers.0.self_attn.q_proj": 2, "layers.1.self_attn.q_proj": 1,
    }  # fmt: skip
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_what_ships_has_one_rank_and_says_the_same(nf4, tmp_path) -> None:
    model, config = adapted(nf4, "rslora", alpha=3.0, **PATTERNS)
    adapter.export(model.eval(), tmp_path, config)
    document = json.loads((tmp_path / adapter.CONFIG_FILE).read_text())
    assert (document["r"], document["lora_alpha"], document["rank_pattern"], document["alpha_pattern"]) == (
        6,
        6,
        {},
        {},
    )
    shipped = PeftModel.from_pretrained(loading.load_nf4(nf4), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(shipped(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": r".*\.nothing"},
            r"matches no layer, there are down_proj.*a whole path, such as model\.layers\.0",
        ),
        ({"target_modules": "(unclosed"}, "is no regular expression"),
        ({"rank_pattern": {"down": 2}}, r"train\.rank_pattern: 'down' matches no adapted layer"),
        ({"rank_pattern": {"q_proj": 2, r"layers\.0\..*q_proj": 3}}, "that an earlier pattern leaves"),
        ({"alpha_pattern": {"[": 2.0}}, "is no regular expression"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(nf4, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        adapted(nf4, "lora", **settings)


def test_a_pattern_that_would_be_tried_for_days_is_refused(nf4) -> None:
    with pytest.raises(UsageError, match="takes more than a second for one name"):
        adapted(nf4, "lora", target_modules="(.*?)" * 30 + "(?<!j)")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-liner"},
        {"rank_pattern": {"q_proj": 0}},
        {"method": "adalora", "rank_pattern": {"q_proj": 2}},
        {"method": "dylora", "alpha_pattern": {"q_proj": 2.0}},
    ],
)
def test_what_no_run_can_mean_is_refused_by_the_line(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"target_modules|rank_pattern|alpha_pattern"):
        TrainConfig(**settings)
