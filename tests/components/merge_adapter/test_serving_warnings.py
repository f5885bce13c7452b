"""Which settings of an adapter keep a server from serving it without a merge, and which warning says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from components.merge_adapter import serving_warnings

PLAIN = {"r": 16, "lora_alpha": 32, "bias": "none", "modules_to_save": None}
MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


def test_a_plain_adapter_of_the_project_has_nothing_against_it(tiny_adapter: Path) -> None:
    assert serving_warnings.read_warnings(tiny_adapter) == []


@pytest.mark.parametrize(
    ("setting", "servers", "message"),
    [
        ({"r": 40}, "vLLM", "serve with --max-lora-rank 64"),
        ({"r": 1024}, "vLLM", "rank 1024 is above 512"),
        ({"rank_pattern": {"q_proj": 8}}, "vLLM, TGI", "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "vLLM, TGI, llama.cpp", "alpha_pattern"),
        ({"use_dora": True}, "vLLM, TGI, llama.cpp", "DoRA"),
        ({"use_rslora": True}, "llama.cpp", "use_rslora"),
    ],
)
def test_each_setting_that_a_server_does_not_take_is_one_warning(
    setting: dict[str, Any], servers: str, message: str
) -> None:
    (warning,) = serving_warnings.warnings(PLAIN | setting, MODULES)
    assert warning.startswith(f"{servers}: ")
    assert re.search(message, warning)


def test_layers_with_unusual_names_are_named() -> None:
    assert serving_warnings.warnings(PLAIN, [*MODULES, "lm_head", "model.layers.0.attn.c_attn"]) == [
        "vLLM, TGI, llama.cpp: LoRA on lm_head is not supported for every model",
        "vLLM, TGI, llama.cpp: layers named c_attn may be unknown to the server",
    ]
