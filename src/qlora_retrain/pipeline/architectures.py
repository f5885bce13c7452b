"""Name what is wrong with a base model whose architecture this pipeline cannot carry through, from its files alone.

The plan refuses (12) such a base before any work is done. What no entry here knows is refused by `quantize_model`,
where less of the model than `quantize.min_quantized_fraction` is in linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

_EXPERTS = re.compile(r"(moe_)?(num|n)_(?!shared)(\w+_)?experts")
_MODALITY = re.compile(
    r"(vision|visual|image|audio|speech|video|vq)\w*_config|visual|(mm_)?(vision|audio|image)_tower|image_size|num_channels"
)
_MODALITY_TENSOR = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|mm_projector|audio_tower)\."
)
_QUANTIZED_TENSOR = re.compile(r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|weight\.absmax)$")
# Types of layers that look back at other tokens, and those that do not mix tokens at all.
_STATELESS_LAYER = re.compile(r"(?!linear|lightning).*attention|attn|global|local|full|sliding|dense|mlp|moe|sparse")
_STATE_KEYS = re.compile(r"(mamba|ssm)_\w+|\w+_mamba_\w+|state_size|lru_width|conv_L_cache|hybrid_override_pattern")
_STATE_FAMILIES = ("mamba", "rwkv", "xlstm", "retnet")
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "decoder_config", "thinker_config")
_TRANSPOSED_FAMILIES = ("gpt2", "openai-gpt", "imagegpt")


def faults(
    config: Mapping[str, Any], tensor_names: Collection[str] = (), file_names: Collection[str] = ()
) -> list[str]:
    """Return what is wrong with the architecture, each as a sentence with what to do; empty where nothing is known.

    Args:
        config: The parsed config.json.
        tensor_names: The names of the weights, as far as an index or a header has them.
        file_names: The names of the model's files.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    reasons = [
        _quantized(config, tensor_names, file_names),
        _several_parts(config, name, tensor_names),
        _no_language_head(config, name, tensor_names),
        _state(config),
        _experts(config, tensor_names),
        _transposed(config, name),
        _own_linear(config, name),
        "its file has LoRA matrices (lora_A) beside the weights; merge them first (merge_and_unload of PEFT)"
        if any(".lora_A." in tensor for tensor in tensor_names)
        else None,
    ]
    return [reason for reason in reasons if reason]


def _quantized(config: Mapping[str, Any], tensor_names: Collection[str], file_names: Collection[str]) -> str | None:
    settings = config.get("quantization_config") or config.get("compression_config")
    form = None
    if isinstance(settings, Mapping):
        form = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown")
    elif settings_file := {"quantize_config.json", "quant_config.json", "hf_quant_config.json"} & set(file_names):
        form = f"by {min(settings_file)}"
    elif tensor := next((tensor for tensor in tensor_names if _QUANTIZED_TENSOR.search(tensor)), None):
        form = f"by its tensor {tensor}"
    if form is None:
        return None
    return (
        f"is already quantized ({form}), and this pipeline quantizes the original 16-bit weights; give the model that "
        "it was quantized from"
    )


def _several_parts(config: Mapping[str, Any], name: str | None, tensor_names: Collection[str]) -> str | None:
    """Return the fault of an encoder with a decoder, or of a wrapper that reads images or sound."""
    if config.get("is_encoder_decoder"):
        return (
            f"is an encoder with a decoder ({name or 'is_encoder_decoder: true'}), and this pipeline trains causal "
            "language models, which have a decoder alone; choose one of those"
        )
    if config.get("encoder_layers") and config.get("decoder_layers"):
        return (
            f"is the decoder of an encoder with a decoder ({name or 'encoder_layers, decoder_layers'}), and its layers "
            "that look at the encoder would read nothing; choose a causal language model"
        )
    sign = next(
        (key for part in _parts(config) for key, value in part.items() if value and _MODALITY.fullmatch(key)), None
    )
    if sign is None and name and re.search(r"ForConditionalGeneration|ForVision2Seq|ForImageTextToText", name):
        sign = f"architectures: {name}"
    if sign is None and (tensor := next((t for t in tensor_names if _MODALITY_TENSOR.search(t)), None)):
        sign = f"the tensor {tensor}"
    if sign is None:
        return None
    return (
        f"wraps a language model in one for images or sound ({sign}), whose other parts this pipeline can neither "
        "quantize nor train; choose a text-only model of the family, or save its language model alone"
    )


def _no_language_head(config: Mapping[str, Any], name: str | None, tensor_names: Collection[str]) -> str | None:
    # The part before the family's name does not matter; a name of one's own may follow.
    if name and not re.search(r"CausalLM|LMHead|ForConditionalGeneration|ForVision2Seq|ForImageTextToText", name):
        kind = "is an encoder, which sees the answer that it should learn" if "MaskedLM" in name else "has another head"
        return f"architectures: {name} {kind}, and no head that predicts the next token; choose a causal language model"
    if head := next((tensor for tensor in tensor_names if re.match(r"(score|v_head|classifier)\.", tensor)), None):
        return (
            f"has the tensor {head}, the head of a reward model or a classifier; choose the language model that it was "
            "trained from"
        )
    # BERT and its family, also where they are used as a language model.
    if "type_vocab_size" in config and not config.get("is_decoder"):
        return (
            f"is an encoder ({name or config.get('model_type')}, is_decoder: false), which sees the answer that it "
            "should learn; choose a causal language model"
        )
    return None


def _state(config: Mapping[str, Any]) -> str | None:
    """Return the fault of layers that carry a state from token to token."""
    for part in _text_parts(config):
        layers = next((part[key] for key in ("layer_types", "layers_block_type", "block_types") if part.get(key)), None)
        if isinstance(layers, Sequence):
            kinds = sorted({str(kind) for kind in layers if not _STATELESS_LAYER.fullmatch(str(kind))})
        else:
            family = str(part.get("model_type", ""))
            kinds = [key for key in part if _STATE_KEYS.fullmatch(key) and part[key]][:1]
            kinds += [family] if any(word in family for word in _STATE_FAMILIES) and not kinds else []
        if kinds:
            return (
                f"has state-space or other recurrent layers ({', '.join(kinds)}), which carry a state from token to "
                "token; rows are packed and labels are scored here by the keys and values of attention; choose a model "
                "with attention in every layer"
            )
    return None


def _experts(config: Mapping[str, Any], tensor_names: Collection[str]) -> str | None:
    sign = None
    for part in _parts(config):
        if not _is_dense(part):
            keys = (key for key, value in part.items() if _EXPERTS.fullmatch(key) and _is_several(value))
            sign = sign or next((f"{key}: {part[key]}" for key in keys), None)
    if sign is None and not any(_is_dense(part) for part in _parts(config)):
        tensor = next((tensor for tensor in tensor_names if re.search(r"\.(experts|block_sparse_moe)\.", tensor)), None)
        sign = f"the tensor {tensor}" if tensor else None
    if sign is None:
        return None
    return (
        f"is a mixture of experts ({sign}), and its experts are no Linear layers: they would stay in 16 bits, and no "
        "adapter would reach them; choose a dense model"
    )


def _is_several(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(number, int) and not isinstance(number, bool) and number > 1 for number in values)


def _is_dense(part: Mapping[str, Any]) -> bool:
    """Return whether a config has numbers of experts and yet no layer that uses them."""
    num_layers = part.get("num_hidden_layers")
    if part.get("is_moe") is False or part.get("enable_moe_block") is False:
        return True
    if isinstance(kinds := part.get("mlp_layer_types"), list) and kinds:
        return all(kind == "dense" for kind in kinds)
    if not isinstance(num_layers, int):
        return False
    dense_layers = part.get("first_k_dense_replace")
    dense_indices = part.get("mlp_only_layers")
    is_covered = isinstance(dense_indices, list) and len({str(index) for index in dense_indices}) >= num_layers > 0
    return is_covered or (isinstance(dense_layers, int) and dense_layers >= num_layers)


def _transposed(config: Mapping[str, Any], name: str | None) -> str | None:
    if config.get("model_type") not in _TRANSPOSED_FAMILIES and name not in ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel"):
        return None
    return (
        f"keeps its weights in Conv1D layers, transposed ({name or config.get('model_type')}), which are no Linear "
        "layers: adapter and merge would not fit them; choose a model of another family"
    )


def _own_linear(config: Mapping[str, Any], name: str | None) -> str | None:
    # RefinedWeb is the older name, in files from before transformers had the family.
    if config.get("model_type") not in ("falcon", "RefinedWeb", "RefinedWebModel") and name != "FalconForCausalLM":
        return None
    return (
        f"has linear layers of a class of its own (FalconLinear in {name or config.get('model_type')}), which "
        "bitsandbytes leaves in 16 bits; choose a model of another family, such as Falcon 3, which is a Llama"
    )


def _text_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the config of the language model, which a wrapper nests."""
    yield config
    yield from (value for key, value in config.items() if key in _TEXT_CONFIGS and isinstance(value, Mapping))


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the config and every config nested in it."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping) and key != "quantization_config":
            yield from _parts(value)
