"""How many tokens a model takes, from the facts that published models have in their config.json."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_retrain.lm.context_length import max_context_tokens

LLAMA_3_ROPE = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0}
CONFIGS: dict[str, tuple[dict[str, Any], int | None]] = {
    "Llama-2": ({"max_position_embeddings": 4096}, 4096),
    "Llama-3.1: the limit is that after scaling": (
        {"max_position_embeddings": 131072, "rope_scaling": LLAMA_3_ROPE},
        131072,
    ),
    "vicuna-16k: the limit is that before scaling": (
        {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}},
        16384,
    ),
    "Qwen2.5 with YaRN": (
        {
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    "Phi-3-128k": (
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        },
        131072,
    ),
    "gemma-3: parameters for each type of layer": (
        {
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0},
            },
        },
        262144,
    ),
    "Mistral: a window is no limit": ({"max_position_embeddings": 32768, "sliding_window": 4096}, 32768),
    "transformers 5": ({"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default"}}, 8192),
    "GPT-2": ({"n_positions": 1024, "n_ctx": 1024}, 1024),
    "mpt": ({"max_seq_len": 2048, "attn_config": {"alibi": True}}, 2048),
    "falcon with ALiBi": ({"max_position_embeddings": 2048, "alibi": True}, None),
    "bloom": ({"seq_length": 2048}, None),
    "a wrapper": ({"text_config": {"max_position_embeddings": 8192}}, 8192),
    "null": ({"max_position_embeddings": None, "rope_scaling": None}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize(("config", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_the_context_is_what_the_config_says(config: dict[str, Any], expected: int | None) -> None:
    assert max_context_tokens(config) == expected
