"""Write the merged model as one GGUF file, tensor by tensor, for llama.cpp and programs built on it.

Reads a plain transformers folder; writes with the `gguf` package. Refuses (12) architectures, rotary scalings and
tokenizers whose GGUF names it does not know: a file with a wrong name loads but answers nonsense.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from components.merge_adapter import gguf_blocks
from components.merge_adapter.moved_minima import Blocks
from qlora_retrain.core import progress
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import chat, gguf_names
from qlora_retrain.lm.chat import ChatTokenizer, RowRefused
from qlora_retrain.lm.weight_files import SafetensorsFolder

TENSOR_TYPES = {
    "gguf-f16": gguf.GGMLQuantizationType.F16,
    "gguf-q8_0": gguf.GGMLQuantizationType.Q8_0,
    "gguf-q4_0": gguf.GGMLQuantizationType.Q4_0,
    "gguf-q4_1": gguf.GGMLQuantizationType.Q4_1,
}
_FILE_TYPES = {
    "gguf-f16": gguf.LlamaFileType.MOSTLY_F16,
    "gguf-q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "gguf-q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "gguf-q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}
_FOUR_BITS = ("gguf-q4_0", "gguf-q4_1")
_EMBEDDINGS_AND_HEAD = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class _Family:
    """A model family in GGUF.

    Attributes:
        arch: GGUF's architecture.
        interleaved: Whether the two numbers of a rotary pair are neighbours; transformers has them half a head apart.
    """

    arch: gguf.MODEL_ARCH
    interleaved: bool


_FAMILIES = {
    "LlamaForCausalLM": _Family(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "Qwen2ForCausalLM": _Family(gguf.MODEL_ARCH.QWEN2, interleaved=False),
    "Qwen3ForCausalLM": _Family(gguf.MODEL_ARCH.QWEN3, interleaved=False),
}


def refuse_unsupported(base_model: Path) -> None:
    """Raise `UsageError` where the model cannot be written as GGUF; of the weights only the names are read."""
    # The plan checks only the files; here the config and the tokenizer are checked as transformers loads them.
    config = _load_config(base_model)
    family = _FAMILIES[gguf_names.architecture(config)]
    tokenizer = _backend_tokenizer(base_model)
    gguf_names.pre_tokenizer_name(tokenizer)
    gguf_names.refuse_tokens_without_embedding(config, tokenizer)

    name_map = _tensor_name_map(family, config)
    with SafetensorsFolder(base_model) as weights:
        for name in weights.names:
            _gguf_name(name_map, name)


def write_gguf(model: Path, path: Path, export_type: str, blocks: Blocks = lambda name: None) -> None:
    """Write the file.

    Args:
        model: The merged model, a plain transformers folder.
        path: The file to write.
        export_type: One of `TENSOR_TYPES`, the type of matrices; vectors are stored in fp32. With 4 bits, embeddings
            and output layer are stored as q8_0, since llama.cpp's quantizer also gives them more bits than others.
        blocks: Returns a matrix of the model as it is stored in a file of this type, where it is in 4 bits already.

    Raises:
        UsageError: If the family, the tokenizer or a tensor has no name in GGUF.
        IntegrityError: If a number, or the scale of a block, is too large for f16.
    """
    config = _load_config(model)
    family = _FAMILIES[gguf_names.architecture(config)]
    name_map = _tensor_name_map(family, config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[family.arch])
    _add_metadata(writer, config, export_type)
    _add_tokenizer(writer, model, config["vocab_size"])

    with SafetensorsFolder(model) as weights, contextlib.closing(writer):
        # The header lists every tensor with its size, so it is complete before the first value is computed.
        tensor_types = []
        for name in weights.names:
            spec = weights.spec(name)
            gguf_name = _gguf_name(name_map, name)
            tensor_type = _tensor_type(gguf_name, spec.shape, export_type)
            shape = gguf.quant_shape_to_byte_shape(spec.shape, tensor_type)
            size = int(np.prod(shape))
            writer.add_tensor_info(gguf_name, shape, np.dtype(np.uint8), size, raw_dtype=tensor_type)
            tensor_types.append((name, tensor_type))
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

        for name, tensor_type in tensor_types:
            packed = blocks(name)
            if packed is None:
                values = _permute_rotary(name, weights.tensor(name).float(), family, config)
                stored = gguf_blocks.quantize(values, tensor_type)
            else:
                stored = _permute_rotary(name, packed, family, config).numpy()
            if not gguf_blocks.is_finite(stored, tensor_type):
                raise IntegrityError(
                    f"merge.exports: {export_type}: {name} holds numbers too large for f16; leave this export out"
                )
            writer.write_tensor_data(stored)


def _tensor_name_map(family: _Family, config: dict[str, Any]) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(family.arch, config["num_hidden_layers"])


def _gguf_name(name_map: gguf.TensorNameMap, name: str) -> str:
    gguf_name: str | None = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
    if gguf_name is None:
        raise UsageError(
            f"merge.exports: GGUF has no name for the tensor {name}; remove the gguf exports from the list"
        )
    return gguf_name


def _load_config(model: Path) -> dict[str, Any]:
    """Read config.json as this version of transformers understands it: old names are renamed, defaults filled in."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)

    # Configs may leave these two out: the heads then divide the hidden size, and each has keys of its own.
    heads = config.num_attention_heads
    fields: dict[str, Any] = config.to_dict()
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields["num_key_value_heads"] = getattr(config, "num_key_value_heads", None) or heads
    return fields


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], export_type: str) -> None:
    # The fields that llama.cpp's loader reads for these architectures.
    writer.add_file_type(_FILE_TYPES[export_type])
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


def _tensor_type(gguf_name: str, shape: tuple[int, ...], export_type: str) -> gguf.GGMLQuantizationType:
    """Return how a tensor is stored; a row that does not fill whole blocks stays in f16."""
    # Norms and biases stay in fp32: they are small, and sensitive to rounding.
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    tensor_type = (
        TENSOR_TYPES["gguf-q8_0"]
        if export_type in _FOUR_BITS and gguf_name in _EMBEDDINGS_AND_HEAD
        else TENSOR_TYPES[export_type]
    )

    # A block has 32 numbers in the quantized types, and one in f16.
    block, _ = gguf.GGML_QUANT_SIZES[tensor_type]
    return tensor_type if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _permute_rotary(name: str, tensor: torch.Tensor, family: _Family, config: dict[str, Any]) -> torch.Tensor:
    """Permute the rows of query and key weights into GGUF's order: a head's two halves become adjacent pairs."""
    layer_name = name.split(".")[-2]
    if not family.interleaved or layer_name not in ("q_proj", "k_proj"):
        return tensor
    heads = config["num_attention_heads" if layer_name == "q_proj" else "num_key_value_heads"]
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])  # (H, 2, D / 2, in features)
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def _backend_tokenizer(model: Path) -> dict[str, Any]:
    """Return the JSON of the loaded tokenizer; a model family's class can change what tokenizer.json says."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError("merge.exports: GGUF needs a fast tokenizer (tokenizer.json); the base has a slow one")
    document: dict[str, Any] = json.loads(backend.to_str())
    return document


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, vocab_size: int) -> None:
    document, chat_tokenizer = _backend_tokenizer(model), chat.load_tokenizer(model)
    tokenizer = chat_tokenizer.tokenizer

    # Embeddings may have more rows than the tokenizer has tokens; llama.cpp needs a name for each row.
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, i in document["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    # llama.cpp does not print control tokens, so special tokens do not appear in answers.
    for added_token in document["added_tokens"]:
        tokens[added_token["id"]] = added_token["content"]
        types[added_token["id"]] = gguf.TokenType.CONTROL if added_token["special"] else gguf.TokenType.USER_DEFINED

    # Old versions of tokenizers write a merge as one string, new ones as a pair.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")  # GGUF's word for byte-level BPE
    writer.add_tokenizer_pre(gguf_names.pre_tokenizer_name(document))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    _add_ends(writer, chat_tokenizer)

    # A trial shows whether the tokenizer puts a BOS before plain text.
    first_token = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(first_token == tokenizer.bos_token_id)
    template = tokenizer.chat_template
    named = [{"name": name, "template": text} for name, text in template.items()] if isinstance(template, dict) else ()
    writer.add_chat_template(named or template)


def _add_ends(writer: gguf.GGUFWriter, tokenizer: ChatTokenizer) -> None:
    """Name the tokens that end an answer: GGUF has a place each for the end of a text, of a turn and of a message."""
    ends = list(tokenizer.stop_ids)
    eos, turn_end = tokenizer.tokenizer.eos_token_id, _turn_end(tokenizer)
    eos = eos if eos in ends else ends[0]
    writer.add_eos_token_id(eos)
    # The end of a turn is what training supervised; llama.cpp would guess it by name, and may guess another token.
    turn_end = turn_end if turn_end in ends else eos
    writer.add_eot_token_id(turn_end)

    # Some families end a message that calls a tool with a mark of its own; llama.cpp stops at the third place like at
    # the other two.
    names = {token: str(tokenizer.tokenizer.convert_ids_to_tokens(token)) for token in ends}
    others = sorted(
        (token for token in ends if token not in (eos, turn_end)), key=lambda token: "eom" not in names[token]
    )
    if others:
        writer.add_eom_token_id(others[0])
    if others[1:]:
        text = ", ".join(names[token] for token in others[1:])
        progress.say(f"GGUF names three ends of an answer; llama.cpp stops at {text} only where it knows the name")


def _turn_end(tokenizer: ChatTokenizer) -> int | None:
    try:
        return tokenizer.answer_ids([{"role": "user", "content": "a"}], "a")[-1]
    except RowRefused:
        return None
