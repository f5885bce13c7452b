"""A plan says how long the learning rate rises, and holds it as one number or the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline import explain, make_plan


@pytest.mark.parametrize(
    ("overrides", "ratio", "steps"),
    [
        ([], 0.03, None),
        (["train.warmup_ratio=0.1"], 0.1, None),
        (["train.warmup_steps=100"], None, 100),
        (["train.warmup_steps=0"], None, 0),
    ],
)
def test_a_plan_holds_the_share_of_the_steps_or_their_number(
    line: Path, root_uri: str, overrides: list[str], ratio: float | None, steps: int | None
) -> None:
    plan = make_plan.make_plan(line, root_uri, overrides=overrides)
    identity = next(planned.identity for planned in plan.steps if "warmup_steps" in planned.identity)
    assert (identity["warmup_ratio"], identity["warmup_steps"]) == (ratio, steps)
    assert ("train.warmup_ratio = 0.03: not set" in explain.as_text(plan)) == (not overrides)
    # What a plan holds can be read again.
    assert TrainConfig.model_validate({k: v for k, v in identity.items() if k in TrainConfig.model_fields})


def test_a_plan_with_both_is_refused(line: Path, root_uri: str) -> None:
    with pytest.raises((UsageError, ValidationError), match="say the same thing twice; leave one of them out"):
        make_plan.make_plan(line, root_uri, overrides=["train.warmup_steps=100", "train.warmup_ratio=0.1"])


@pytest.mark.parametrize(
    ("value", "read"), [(True, 1), (False, None), (None, None), (1, 1), (3, 3), ("3", 3), ("offload", "offload")]
)
def test_layers_are_recomputed_as_the_setting_says(value: Any, read: Any) -> None:
    setting = TrainConfig(gradient_checkpointing=value).gradient_checkpointing
    assert setting == read
    assert type(setting) is type(read)


@pytest.mark.parametrize("value", [0, -1, "all", 1.5])
def test_another_way_to_recompute_layers_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError):
        TrainConfig(gradient_checkpointing=value)
