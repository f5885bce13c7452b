"""What is wrong with a base's architecture, from the facts that published models have in their config.json."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_retrain.pipeline.architectures import faults

CAUSAL: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 32},
    "Qwen2.5-7B": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    "gemma-3-270m": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma-4-text": {"architectures": ["Gemma4ForCausalLM"], "num_experts": None, "enable_moe_block": False},
    "Phi-3.5-mini": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "embd_layer": "default"},
    # A hybrid by its class, with attention in all of its layers and no experts.
    "granite-4.0-350m": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * 28,
        "mamba_d_state": 256,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    },
    "Doge-160M": {"architectures": ["DogeForCausalLM"], "num_experts": 16384, "is_moe": False},
    "Hunyuan-7B": {"architectures": ["HunYuanDenseV1ForCausalLM"], "num_experts": 1},
    "deepseek dense": {"architectures": ["DeepseekV2ForCausalLM"], "n_routed_experts": None, "n_shared_experts": None},
    "qwen moe without a sparse layer": {"num_experts": 8, "num_hidden_layers": 2, "mlp_only_layers": [0, 1]},
    "opt-1.3b": {"architectures": ["OPTForCausalLM"], "model_type": "opt"},
    "pythia": {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"},
    "starcoderbase": {"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode"},
    "bloom": {"architectures": ["BloomForCausalLM"], "model_type": "bloom"},
    "mpt": {"architectures": ["MPTForCausalLM"], "model_type": "mpt", "attn_config": {"alibi": True}},
    "no architectures": {"model_type": "llama"},
    "nothing": {},
}

EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen1.5-MoE": {"architectures": ["Qwen2MoeForCausalLM"], "num_experts": 60, "decoder_sparse_step": 1},
    "Qwen3-30B-A3B": {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128, "mlp_only_layers": []},
    "gpt-oss-20b": {"architectures": ["GptOssForCausalLM"], "num_local_experts": 32},
    "DeepSeek-V2-Lite": {
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 27,
    },
    "DeepSeek-V3": {"n_routed_experts": 256, "first_k_dense_replace": 3, "num_hidden_layers": 61},
    "Kimi-K2": {"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 384},
    "GLM-4.5-Air": {"architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 128},
    "granite-3.1-3b-a800m": {"architectures": ["GraniteMoeForCausalLM"], "num_local_experts": 40},
    "dbrx": {"architectures": ["DbrxForCausalLM"], "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}},
    "OLMoE-1B-7B": {"architectures": ["OlmoeForCausalLM"], "num_experts": 64},
    "Phi-3.5-MoE": {"architectures": ["PhimoeForCausalLM"], "num_local_experts": 16},
    "ERNIE-4.5-21B-A3B": {"architectures": ["Ernie4_5_MoeForCausalLM"], "moe_num_experts": 64},
    "ERNIE-4.5-VL, two numbers": {"moe_num_experts": [64, 64]},
    "MiniMax-M2": {"architectures": ["MiniMaxM2ForCausalLM"], "num_local_experts": 256},
    "Llama-4 text": {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "num_local_experts": 16},
    "in a wrapper": {"text_config": {"model_type": "x", "num_experts": 128}},
    "in a wrapper's own name": {"llm_config": {"moe_config": {"num_experts": 8}}},
}

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2.5-VL": (
        {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": {"a": 1}},
        "images or sound",
    ),
    "llava": ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"a": 1}}, "images or sound"),
    "LlavaLlama": ({"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "clip"}, "images or sound"),
    "gemma-3-4b": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"a": 1}, "text_config": {"a": 1}},
        "vision_config",
    ),
    "gemma-3n": ({"architectures": ["Gemma3nForConditionalGeneration"], "audio_config": {"a": 1}}, "images or sound"),
    "Qwen2-Audio": (
        {"architectures": ["Qwen2AudioForConditionalGeneration"], "audio_config": {"a": 1}},
        "audio_config",
    ),
    "Idefics": ({"architectures": ["Idefics3ForConditionalGeneration"], "vision_config": {"a": 1}}, "images or sound"),
    "Phi-4-multimodal": (
        {"architectures": ["Phi4MultimodalForCausalLM"], "vision_config": {"a": 1}},
        "images or sound",
    ),
    "Fuyu": ({"architectures": ["FuyuForCausalLM"], "num_channels": 3, "text_config": {"a": 1}}, "images or sound"),
    "DialoGPT": ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": 1024}, "Conv1D"),
    "openai-gpt": ({"architectures": ["OpenAIGPTLMHeadModel"], "model_type": "openai-gpt"}, "Conv1D"),
    "flan-t5": (
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        "encoder with a decoder (T5ForConditionalGeneration)",
    ),
    "bart": ({"architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}, "encoder with a decoder"),
    "bart's decoder alone": (
        {"architectures": ["BartForCausalLM"], "is_encoder_decoder": False, "encoder_layers": 6, "decoder_layers": 6},
        "is the decoder of an encoder with a decoder (BartForCausalLM)",
    ),
    "falcon-7b": ({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}, "FalconLinear"),
    "bert": ({"architectures": ["BertForMaskedLM"], "type_vocab_size": 2}, "BertForMaskedLM is an encoder"),
    "modernbert": ({"architectures": ["ModernBertForMaskedLM"]}, "ModernBertForMaskedLM is an encoder"),
    "roberta as a language model": (
        {"architectures": ["RobertaForCausalLM"], "type_vocab_size": 1, "is_decoder": False},
        "is an encoder (RobertaForCausalLM",
    ),
    "an embedding model": ({"architectures": ["Qwen2Model"]}, "Qwen2Model has another head"),
    "a reward model": ({"architectures": ["LlamaForSequenceClassification"]}, "has another head"),
    "a reward model of its own class": ({"architectures": ["Qwen2ForRewardModel"]}, "has another head"),
    "a tagger": ({"architectures": ["Qwen2ForTokenClassification"]}, "has another head"),
    "mamba": ({"architectures": ["MambaForCausalLM"], "state_size": 16, "model_type": "mamba"}, "(state_size)"),
    "falcon-mamba": ({"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba"}, "(falcon_mamba)"),
    "Falcon-H1": ({"architectures": ["FalconH1ForCausalLM"], "mamba_d_ssm": 1024}, "(mamba_d_ssm)"),
    "granite-4.0-h": ({"layer_types": ["mamba", "attention"], "mamba_d_state": 128}, "(mamba)"),
    "nemotron-nano-v2": (
        {"hybrid_override_pattern": "M-M-M*-", "model_type": "nemotron_h"},
        "(hybrid_override_pattern)",
    ),
    "recurrentgemma": ({"block_types": ["recurrent", "recurrent", "attention"]}, "(recurrent)"),
    "LFM2": ({"layer_types": ["conv", "full_attention"]}, "(conv)"),
    "Qwen3-Next layers": ({"layer_types": ["linear_attention", "full_attention"]}, "(linear_attention)"),
    "MiniMax-Text layers": ({"layer_types": ["lightning_attention", "full_attention"]}, "(lightning_attention)"),
    "rwkv": ({"architectures": ["RwkvForCausalLM"], "model_type": "rwkv"}, "(rwkv)"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized (gptq)"),
    "AWQ": ({"quantization_config": {"quant_method": "awq"}}, "already quantized (awq)"),
    "fp8": ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, "already quantized (fp8)"),
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "already quantized (mxfp4)"),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, "already quantized (bitsandbytes)"),
    "compressed": ({"compression_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
}


@pytest.mark.parametrize("config", CAUSAL.values(), ids=CAUSAL)
def test_a_dense_causal_language_model_has_no_fault(config: dict[str, Any]) -> None:
    assert (
        faults(config, ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]) == []
    )


@pytest.mark.parametrize("config", EXPERTS.values(), ids=EXPERTS)
def test_a_mixture_of_experts_is_named(config: dict[str, Any]) -> None:
    (fault,) = faults(config)
    assert fault.startswith("is a mixture of experts (")
    assert fault.endswith("choose a dense model")


@pytest.mark.parametrize(("config", "words"), OTHERS.values(), ids=OTHERS)
def test_another_architecture_is_named_by_its_sign(config: dict[str, Any], words: str) -> None:
    (fault,) = faults(config)
    assert words in fault
    assert "; choose" in fault or "; give" in fault


def test_every_fault_is_named() -> None:
    config = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "vision_config": {"hidden_size": 8},
        "text_config": {"num_local_experts": 16},
        "quantization_config": {"quant_method": "fp8"},
    }
    assert [fault.split("(")[0] for fault in faults(config)] == [
        "is already quantized ",
        "wraps a language model in one for images or sound ",
        "is a mixture of experts ",
    ]


SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "Gemma3Text": {},
    "Phi3": {},
    "Olmo2": {},
    "GPTNeoX": {},
    "Mixtral": {"num_local_experts": 8},
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 48},
    "Qwen2Moe": {"num_experts": 8, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 8},
    "Olmoe": {"num_experts": 8},
    "GptOss": {"num_local_experts": 8},
    "GraniteMoe": {"num_local_experts": 8},
    "Phimoe": {"num_local_experts": 8},
    "DeepseekV3": {
        "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "moe_intermediate_size": 48,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_fault_of_experts_exactly_where_its_weights_are_no_linear_layers(family: str) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    aside = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    aside |= {id(p) for p in model.get_output_embeddings().parameters()}
    sizes = {id(p): p.numel() for p in model.parameters() if id(p) not in aside}
    linear = {
        id(m.weight): m.weight.numel()
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and id(m.weight) not in aside
    }
    is_linear = sum(linear.values()) / sum(sizes.values()) >= 0.9

    reasons = faults({**config.to_dict(), "architectures": [type(model).__name__]})
    expected = [] if is_linear else [True]
    assert [reason.startswith("is a mixture of experts") for reason in reasons] == expected
