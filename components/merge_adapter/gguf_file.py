"""The merged model as one GGUF file, tensor by tensor, for llama.cpp and what is built on it.

Reads a plain transformers folder; writes with the `gguf` package. Refuses (12) architectures, rotary scalings and
tokenizers whose names in GGUF it does not know: a file under a wrong name loads, and answers nonsense.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from components.merge_adapter.weights import Weights
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import chat, gguf_names

TYPES = {
    "gguf-f16": gguf.GGMLQuantizationType.F16,
    "gguf-q8_0": gguf.GGMLQuantizationType.Q8_0,
    "gguf-q4_0": gguf.GGMLQuantizationType.Q4_0,
}
_FILE_TYPES = {
    "gguf-f16": gguf.LlamaFileType.MOSTLY_F16,
    "gguf-q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "gguf-q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_ENDS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class _Family:
    """What GGUF calls a family, and whether its rotary pairs are neighbours there (halves apart in transformers)."""

    arch: gguf.MODEL_ARCH
    interleaved: bool


_FAMILIES = {
    "LlamaForCausalLM": _Family(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "Qwen2ForCausalLM": _Family(gguf.MODEL_ARCH.QWEN2, interleaved=False),
    "Qwen3ForCausalLM": _Family(gguf.MODEL_ARCH.QWEN3, interleaved=False),
}


def check(base_model: Path) -> None:
    """Raise `UsageError` where the model cannot be written as GGUF; no weight is read but its name."""
    config = _config(base_model)
    family = _FAMILIES[gguf_names.family(config)]
    tokenizer = _tokenizer(base_model)
    gguf_names.cut(tokenizer)
    gguf_names.embedded(config, tokenizer)
    names = _names(family, config)
    with Weights(base_model) as weights:
        for name in weights.names:
            _target(names, name)


def write(model: Path, path: Path, kind: str) -> None:
    """Write the file.

    Args:
        model: The merged model, a plain transformers folder.
        path: The file to be made.
        kind: One of `TYPES`: how matrices are stored. Vectors are stored in fp32; with q4_0 embeddings and output
            layer are stored as q8_0, as llama.cpp's own quantizer gives them more bits than the rest.

    Raises:
        UsageError: If the family, the tokenizer or a tensor has no name in GGUF.
        IntegrityError: If a number is too large for f16.
    """
    config = _config(model)
    family = _FAMILIES[gguf_names.family(config)]
    names = _names(family, config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[family.arch])
    _describe(writer, config, kind)
    _add_tokenizer(writer, model, config["vocab_size"])
    with Weights(model) as weights:
        plan = []
        for name in weights.names:
            spec = weights.spec(name)
            target = _target(names, name)
            stored = _type(target, spec.shape, kind)
            shape = gguf.quant_shape_to_byte_shape(spec.shape, stored)
            size = int(np.prod(shape))
            writer.add_tensor_info(target, shape, np.dtype(np.uint8), size, raw_dtype=stored)
            plan.append((name, stored))
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, stored in plan:
            values = _ordered(name, weights.tensor(name).float(), family, config).numpy()
            with np.errstate(over="ignore"):
                packed = gguf.quants.quantize(values, stored)
            if packed.dtype == np.float16 and not np.isfinite(packed).all():
                raise IntegrityError(f"merge.exports: {kind}: {name} holds numbers too large for f16; export q8_0")
            writer.write_tensor_data(packed.view(np.uint8))
    writer.close()


def _names(family: _Family, config: dict[str, Any]) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(family.arch, config["num_hidden_layers"])


def _target(names: gguf.TensorNameMap, name: str) -> str:
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UsageError(f"merge.exports: GGUF has no name for {name}; take the gguf forms out of the list")
    return found


def _config(model: Path) -> dict[str, Any]:
    """config.json as this version of transformers understands it: older names are renamed, defaults filled in."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    heads = config.num_attention_heads
    found: dict[str, Any] = config.to_dict()
    found["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // heads
    found["num_key_value_heads"] = getattr(config, "num_key_value_heads", None) or heads
    return found


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any], kind: str) -> None:
    writer.add_file_type(_FILE_TYPES[kind])
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
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])


def _type(target: str, shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    """How a tensor is stored; a row that does not fill whole blocks stays in f16."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    stored = TYPES["gguf-q8_0"] if kind == "gguf-q4_0" and target in _ENDS else TYPES[kind]
    block, _ = gguf.GGML_QUANT_SIZES[stored]
    return stored if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _ordered(name: str, tensor: torch.Tensor, family: _Family, config: dict[str, Any]) -> torch.Tensor:
    """Rows of queries and keys in the family's order: a head's two halves are folded into pairs of neighbours."""
    part = name.split(".")[-2]
    if not family.interleaved or part not in ("q_proj", "k_proj"):
        return tensor
    heads = config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def _tokenizer(model: Path) -> dict[str, Any]:
    """The tokenizer as it works once loaded: a model's family can change what its tokenizer.json says."""
    backend = getattr(chat.load_tokenizer(model), "backend_tokenizer", None)
    if backend is None:
        raise UsageError("merge.exports: GGUF needs a fast tokenizer (tokenizer.json); the base has a slow one")
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, vocabulary: int) -> None:
    document, tokenizer = _tokenizer(model), chat.load_tokenizer(model)
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [gguf.TokenType.UNUSED] * vocabulary
    for token, i in document["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in document["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")  # GGUF's word for byte-level BPE
    writer.add_tokenizer_pre(gguf_names.cut(document))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(first == tokenizer.bos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
