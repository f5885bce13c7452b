"""Write a model's settings into the header of a GGUF file: those that llama.cpp's reader of its family asks for."""

from __future__ import annotations

import math
from typing import Any

import gguf

from components.merge_adapter.gguf_layout import Layout
from qlora_retrain.lm import gguf_families


def add_settings(writer: gguf.GGUFWriter, layout: Layout, file_type: gguf.LlamaFileType) -> None:
    """Add the settings of the architecture."""
    config = layout.config
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_rotary(writer, config)

    arch = layout.family.arch
    if arch in ("gemma2", "gemma3"):
        _add_gemma(writer, config)
    elif arch == "phi3":
        # llama.cpp asks for the window and applies none; see `gguf_families.reading_differences`.
        writer.add_sliding_window(config.get("sliding_window") or 0)
    elif arch == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def _add_rotary(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Add the base and the scaling; where layers differ, those of layers that see the whole text."""
    parameters = config["rope_parameters"]
    rope = parameters.get("full_attention", parameters)
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    writer.add_rope_dimension_count(int(config["head_dim"] * fraction))
    writer.add_rope_freq_base(rope["rope_theta"])
    if sliding := parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(sliding["rope_theta"])

    kind = gguf_families.rope_type(rope)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        original = rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(_longrope_attention_factor(rope, original, config))


def _longrope_attention_factor(rope: dict[str, Any], original: int, config: dict[str, Any]) -> float:
    if rope.get("attention_factor"):
        return float(rope["attention_factor"])
    stretch = rope.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _add_gemma(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
