"""The architectures that people fine-tune, each as a tiny configuration, and what this pipeline makes of it.

Only the sizes are not those of published models: windows, scaled rotary embeddings, tied embeddings and the kinds of
layers are. Rows of the trial are longer than `WINDOW`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Any]

WINDOW = 16
SIZES: Fields = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "partial_rotary_factor": 1.0,
}  # fmt: skip
LATENT: Fields = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
GPT_SIZES: Fields = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048}
EXPERTS: Fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS: Fields = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS: Fields = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 0,
}  # fmt: skip
HEADS_OF_16: Fields = {"head_dim": 16}
# The scale of Gemma's attention, and a head that is the embeddings, as all of them have it.
GEMMA_HEADS: Fields = {**HEADS_OF_16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
SLIDING: Fields = {"sliding_window": WINDOW}
ALTERNATING: Fields = {"layer_types": ["sliding_attention", "full_attention"], **SLIDING}
FULL: Fields = {"layer_types": ["full_attention"] * 2, "sliding_window": None}

# Cells beside "yes"; the table's legend explains them.
BY_WINDOW, BY_CODE = "padded (window)", "padded (own code)"
NO_FAMILY = "no (family)"

# Words of the plan's reasons.
MIXTURE, PARTS, STATE = "mixture of experts", "images or sound", "recurrent layers"
ENCODER_DECODER, ENCODER = "encoder with a decoder", "is an encoder"
CONV1D, OWN_LINEAR = "Conv1D", "FalconLinear"
# The same in a cell of the table.
SHORT_REASONS = {
    MIXTURE: "a mixture of experts",
    PARTS: "a wrapper for images or sound",
    STATE: "recurrent layers",
    ENCODER_DECODER: "an encoder with a decoder",
    ENCODER: "an encoder",
    CONV1D: "Conv1D layers",
    OWN_LINEAR: "linear layers of its own class",
}


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one architecture.

    Attributes:
        name: Its class in transformers, as config.json has it, and where needed in which form.
        model_type: The family's name in config.json.
        models: Published models that have it.
        settings: The fields of config.json.
        refusal: Words of the plan's refusal; empty where the plan lets it pass.
        packs: How training lays out its rows.
        gguf: Whether it can be exported as GGUF.
        file_prefix: What the names of weights leave out in published files.
        has_weights: Whether a model is built; else its config.json alone is tried.
    """

    name: str
    model_type: str
    models: str
    settings: Fields = field(default_factory=dict)
    refusal: str = ""
    packs: str = "yes"
    gguf: str = NO_FAMILY
    file_prefix: str = ""
    has_weights: bool = True


def _refused(reason: str, name: str, model_type: str, models: str, fields: Fields) -> Architecture:
    return Architecture(name, model_type, models, fields, refusal=reason)


def _config_alone(reason: str, name: str, model_type: str, models: str) -> Architecture:
    return Architecture(name, model_type, models, refusal=reason, has_weights=False)


# fmt: off
DENSE = [
    Architecture("LlamaForCausalLM", "llama", "Llama 2, Llama 3, Vicuna, Yi, SmolLM2, Falcon 3", SIZES, gguf="yes"),
    Architecture(
        "LlamaForCausalLM, scaled rotary embeddings", "llama", "Llama 3.1, 3.2 and 3.3, Tulu 3, R1-Distill-Llama",
        {**SIZES, "rope_parameters": LLAMA_3_ROPE, "tie_word_embeddings": True}, gguf="yes",
    ),
    Architecture(
        "MistralForCausalLM", "mistral", "Mistral 7B v0.2 and v0.3, Mistral Nemo",
        {**SIZES, "sliding_window": None, "head_dim": 32}, gguf="yes",
    ),
    Architecture(
        "MistralForCausalLM, window", "mistral", "Mistral 7B v0.1, Zephyr", {**SIZES, **SLIDING}, packs=BY_WINDOW,
        gguf="yes",
    ),
    Architecture(
        "Qwen2ForCausalLM", "qwen2", "Qwen1.5, Qwen2, Qwen2.5, QwQ, R1-Distill-Qwen",
        {**SIZES, "tie_word_embeddings": True}, gguf="yes",
    ),
    Architecture("Qwen3ForCausalLM", "qwen3", "Qwen3 0.6B to 32B", {**SIZES, "head_dim": 128}, gguf="yes"),
    Architecture("GemmaForCausalLM", "gemma", "Gemma 1", {**SIZES, **HEADS_OF_16}),
    Architecture(
        "Gemma2ForCausalLM", "gemma2", "Gemma 2", {**SIZES, **GEMMA_HEADS, **SLIDING}, packs=BY_WINDOW, gguf="yes"
    ),
    Architecture(
        "Gemma3ForCausalLM", "gemma3_text", "Gemma 3 270M and 1B",
        {**SIZES, **GEMMA_HEADS, **SLIDING, "num_hidden_layers": 6}, packs=BY_WINDOW, gguf="yes",
    ),
    Architecture(
        "Gemma4ForCausalLM", "gemma4_text", "the language model alone of a dense Gemma 4",
        {
            **SIZES, **HEADS_OF_16, **ALTERNATING, "global_head_dim": 16, "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0,
        },
        packs=BY_WINDOW,
    ),
    Architecture("PhiForCausalLM", "phi", "Phi-1.5, Phi-2", SIZES),
    Architecture("Phi3ForCausalLM", "phi3", "Phi-4", {**SIZES, "sliding_window": None}, gguf="yes"),
    Architecture(
        "Phi3ForCausalLM, window", "phi3", "Phi-3, Phi-3.5 mini",
        {**SIZES, **SLIDING, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 1024}, packs=BY_WINDOW,
        gguf="yes",
    ),
    Architecture("SmolLM3ForCausalLM", "smollm3", "SmolLM3 3B", {**SIZES, "no_rope_layers": [1, 0]}),
    Architecture(
        "GraniteForCausalLM", "granite", "Granite 3.0 to 3.3",
        {**SIZES, "logits_scaling": 8.0, "embedding_multiplier": 12.0, "attention_multiplier": 0.1}, gguf="yes",
    ),
    Architecture(
        "GraniteMoeHybridForCausalLM, dense", "granitemoehybrid", "Granite 4.0 350M and 1B",
        {
            **SIZES, "layer_types": ["attention"] * 2, "num_local_experts": 0, "num_experts_per_tok": 0,
            "shared_intermediate_size": 128, "position_embedding_type": "rope",
        },
    ),
    Architecture("OlmoForCausalLM", "olmo", "OLMo 1", SIZES),
    Architecture("Olmo2ForCausalLM", "olmo2", "OLMo 2", SIZES),
    Architecture("Olmo3ForCausalLM", "olmo3", "Olmo 3", {**SIZES, **ALTERNATING}, packs=BY_WINDOW),
    Architecture("CohereForCausalLM", "cohere", "Command R, Aya 23", SIZES),
    Architecture("Cohere2ForCausalLM", "cohere2", "Command R7B, Command A", {**SIZES, **ALTERNATING}, packs=BY_WINDOW),
    Architecture("StableLmForCausalLM", "stablelm", "StableLM 2, Stable Code 3B", SIZES, packs=BY_CODE),
    Architecture("GlmForCausalLM", "glm", "GLM-4 9B", {**SIZES, **HEADS_OF_16}),
    Architecture("Glm4ForCausalLM", "glm4", "GLM-4 0414", {**SIZES, **HEADS_OF_16}),
    Architecture("Ernie4_5ForCausalLM", "ernie4_5", "ERNIE 4.5 0.3B", {**SIZES, **HEADS_OF_16}),
    Architecture("Exaone4ForCausalLM", "exaone4", "EXAONE 4.0 1.2B", {**SIZES, **FULL}),
    Architecture("Exaone4ForCausalLM, window", "exaone4", "EXAONE 4.0 32B", {**SIZES, **ALTERNATING}, packs=BY_WINDOW),
    Architecture("NemotronForCausalLM", "nemotron", "Minitron 4B and 8B", {**SIZES, **HEADS_OF_16}, packs=BY_CODE),
    Architecture(
        "SeedOssForCausalLM", "seed_oss", "Seed-OSS 36B", {**SIZES, "attention_dropout": 0.0, "residual_dropout": 0.0}
    ),
    Architecture("ApertusForCausalLM", "apertus", "Apertus 8B and 70B", SIZES),
    Architecture(
        "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", "Hunyuan 0.5B to 7B", {**SIZES, **HEADS_OF_16}
    ),
    Architecture("ArceeForCausalLM", "arcee", "AFM 4.5B", SIZES),
    Architecture("HeliumForCausalLM", "helium", "Helium 1", {**SIZES, **HEADS_OF_16}),
    Architecture("MiniCPM3ForCausalLM", "minicpm3", "MiniCPM3 4B", {**SIZES, **LATENT}),
    Architecture("Starcoder2ForCausalLM", "starcoder2", "StarCoder2 15B", {**SIZES, "sliding_window": None}),
    Architecture("GPTBigCodeForCausalLM", "gpt_bigcode", "StarCoder, SantaCoder", GPT_SIZES),
    Architecture("GPTNeoXForCausalLM", "gpt_neox", "Pythia, GPT-NeoX 20B", SIZES),
    Architecture(
        "GPTNeoForCausalLM", "gpt_neo", "GPT-Neo",
        {
            "vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128,
            "attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "max_position_embeddings": 2048,
        },
        packs=BY_CODE,
    ),
    Architecture("GPTJForCausalLM", "gptj", "GPT-J 6B", {**GPT_SIZES, "rotary_dim": 8}, packs=BY_CODE),
    Architecture("OPTForCausalLM", "opt", "OPT", {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}),
    Architecture(
        "BloomForCausalLM", "bloom", "BLOOM, BLOOMZ", {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        packs=BY_CODE, file_prefix="transformer.",
    ),
    Architecture(
        "MptForCausalLM", "mpt", "MPT 7B and 30B",
        {"vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 2048}, packs=BY_CODE,
    ),
]
MIXTURES = [
    _refused(MIXTURE, "MixtralForCausalLM", "mixtral", "Mixtral", {**SIZES, **LOCAL_EXPERTS}),
    _refused(
        MIXTURE, "Qwen2MoeForCausalLM", "qwen2_moe", "Qwen1.5-MoE, Qwen2 57B-A14B",
        {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    _refused(MIXTURE, "Qwen3MoeForCausalLM", "qwen3_moe", "Qwen3 30B-A3B and 235B-A22B", {**SIZES, **EXPERTS}),
    _refused(
        MIXTURE, "DeepseekV2ForCausalLM", "deepseek_v2", "DeepSeek V2", {**SIZES, **LATENT, **ROUTED_EXPERTS}
    ),
    _refused(
        MIXTURE, "DeepseekV3ForCausalLM", "deepseek_v3", "DeepSeek V3 and R1, Kimi K2",
        {**SIZES, **LATENT, **ROUTED_EXPERTS},
    ),
    _refused(MIXTURE, "GptOssForCausalLM", "gpt_oss", "gpt-oss", {**SIZES, **HEADS_OF_16, **LOCAL_EXPERTS}),
    _refused(MIXTURE, "Glm4MoeForCausalLM", "glm4_moe", "GLM-4.5, GLM-4.6", {**SIZES, **ROUTED_EXPERTS}),
    _refused(MIXTURE, "Ernie4_5_MoeForCausalLM", "ernie4_5_moe", "ERNIE 4.5 21B-A3B",
             {**SIZES, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64}),
    _refused(MIXTURE, "MiniMaxM2ForCausalLM", "minimax_m2", "MiniMax M2", {**SIZES, **HEADS_OF_16, **LOCAL_EXPERTS}),
    _refused(MIXTURE, "OlmoeForCausalLM", "olmoe", "OLMoE", {**SIZES, **EXPERTS}),
    _refused(MIXTURE, "GraniteMoeForCausalLM", "granitemoe", "Granite 3 MoE", {**SIZES, **LOCAL_EXPERTS}),
    _refused(MIXTURE, "PhimoeForCausalLM", "phimoe", "Phi-3.5-MoE", {**SIZES, **LOCAL_EXPERTS}),
    _refused(MIXTURE, "HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", "Hunyuan A13B",
             {**SIZES, **HEADS_OF_16, "num_experts": 4, "moe_topk": 2}),
    _refused(MIXTURE, "Llama4ForCausalLM", "llama4_text", "the language model alone of Llama 4",
             {**SIZES, **HEADS_OF_16, **LOCAL_EXPERTS, "intermediate_size_mlp": 128}),
]
HYBRIDS = [
    _config_alone(STATE, "JambaForCausalLM", "jamba", "Jamba"),
    _config_alone(STATE, "Mamba2ForCausalLM", "mamba2", "Mamba 2, Codestral Mamba"),
    _config_alone(STATE, "FalconH1ForCausalLM", "falcon_h1", "Falcon-H1"),
    _config_alone(STATE, "NemotronHForCausalLM", "nemotron_h", "Nemotron Nano v2"),
    _config_alone(STATE, "RecurrentGemmaForCausalLM", "recurrent_gemma", "RecurrentGemma"),
    _config_alone(STATE, "Qwen3NextForCausalLM", "qwen3_next", "Qwen3-Next"),
    _refused(STATE, "GraniteMoeHybridForCausalLM, with Mamba layers", "granitemoehybrid", "Granite 4.0 H",
             {**SIZES, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 128}),
    _refused(STATE, "Lfm2ForCausalLM", "lfm2", "LFM2", {**SIZES, "layer_types": ["conv", "full_attention"]}),
]
WRAPPERS = [
    _config_alone(PARTS, "Llama4ForConditionalGeneration", "llama4", "Llama 4 Scout and Maverick"),
    _config_alone(PARTS, "Gemma3ForConditionalGeneration", "gemma3", "Gemma 3 4B to 27B"),
    _config_alone(PARTS, "Gemma3nForConditionalGeneration", "gemma3n", "Gemma 3n"),
    _config_alone(PARTS, "Gemma4ForConditionalGeneration", "gemma4", "Gemma 4"),
    _config_alone(PARTS, "Qwen2VLForConditionalGeneration", "qwen2_vl", "Qwen2-VL"),
    _config_alone(PARTS, "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "Qwen2.5-VL"),
    _config_alone(PARTS, "Qwen3VLForConditionalGeneration", "qwen3_vl", "Qwen3-VL"),
    _config_alone(PARTS, "Qwen3_5ForConditionalGeneration", "qwen3_5", "Qwen3.5"),
    _config_alone(PARTS, "Mistral3ForConditionalGeneration", "mistral3", "Mistral Small 3.1 and 3.2, Ministral 3"),
    _config_alone(PARTS, "LlavaForConditionalGeneration", "llava", "LLaVA 1.5"),
    _config_alone(PARTS, "Phi4MultimodalForCausalLM", "phi4_multimodal", "Phi-4 multimodal"),
]
FURTHER = [
    _refused(OWN_LINEAR, "FalconForCausalLM", "falcon", "Falcon 7B, 40B and 180B",
             {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    _refused(CONV1D, "GPT2LMHeadModel", "gpt2", "GPT-2, DialoGPT", GPT_SIZES),
    _config_alone(ENCODER_DECODER, "T5ForConditionalGeneration", "t5", "T5, FLAN-T5"),
    _config_alone(ENCODER_DECODER, "BartForConditionalGeneration", "bart", "BART"),
    _config_alone(ENCODER, "BertForMaskedLM", "bert", "BERT"),
]
# fmt: on

ARCHITECTURES = {item.name: item for item in [*DENSE, *MIXTURES, *HYBRIDS, *WRAPPERS, *FURTHER]}
