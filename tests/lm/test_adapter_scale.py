"""Alpha follows rank where a line does not set it, so an adapter of any rank is added with the same scale."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from qlora_retrain.lm.adapter_scale import default_alpha, describe_adapter
from qlora_retrain.pipeline import explain, make_plan


@pytest.mark.parametrize("method", ["lora", "rslora", "lora+"])
@pytest.mark.parametrize("rank", [1, 8, 16, 64, 100])
def test_peft_scales_an_adapter_of_any_rank_by_two(rank: int, method: str) -> None:
    config = LoraConfig(
        r=rank, lora_alpha=default_alpha(rank, method), use_rslora=method == "rslora", target_modules=["layer"]
    )
    model = get_peft_model(nn.ModuleDict({"layer": nn.Linear(4, 4)}), config)
    assert model.base_model.model["layer"].scaling["default"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((16, 32.0, "lora"), "rank 16, alpha 32 (alpha/rank = 2)"),
        ((64, 32.0, "lora"), "rank 64, alpha 32 (alpha/rank = 0.5)"),
        ((64, 32.0, "rslora"), "rank 64, alpha 32 (alpha/sqrt(rank) = 4)"),
    ],
)
def test_the_scale_is_told_as_people_compare_it(arguments: tuple[int, float, str], text: str) -> None:
    rank, alpha, method = arguments
    assert describe_adapter(rank, alpha, method) == text


@pytest.mark.parametrize(
    ("overrides", "alpha", "scale"),
    [
        ([], 32.0, "alpha/rank = 2"),
        (["train.rank=64"], 128.0, "alpha/rank = 2"),
        (["train.rank=64", "train.alpha=32"], 32.0, "alpha/rank = 0.5"),
        (["train.rank=64", "train.method=rslora"], 2 * math.sqrt(64), "alpha/sqrt(rank) = 2"),
    ],
)
def test_a_run_with_another_rank_keeps_the_scale_and_the_plan_says_it(
    line: Path, root_uri: str, overrides: list[str], alpha: float, scale: str
) -> None:
    plan = make_plan.make_plan(line, root_uri, overrides=overrides)
    assert next(planned.identity["alpha"] for planned in plan.steps if "alpha" in planned.identity) == alpha
    assert f"alpha {alpha:g} ({scale})" in explain.as_text(plan)
    is_chosen = "train.alpha" in {choice.field for choice in plan.choices}
    assert is_chosen == (not any("alpha" in override for override in overrides))
