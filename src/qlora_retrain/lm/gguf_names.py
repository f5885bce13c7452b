"""Find GGUF's names for a model's architecture, rotary embeddings and pre-tokenizer, from its JSON files alone.

A GGUF file with a wrong name loads but answers nonsense, so a model without a name here is refused (12). The plan
refuses it before training, where the files leave no doubt. `merge_adapter` checks again, on the model as transformers
loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_retrain.core.errors import UsageError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Settings of these families that GGUF does not store, with the value that its readers take.
_FIXED_SETTINGS = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
METADATA_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
# How a tokenizer splits text before its merges (the `pre_tokenizer` of tokenizer.json), and llama.cpp's name for that.
# Both regular expressions must equal those of the models' own files, character by character.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_PUNCTUATION_AND_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _WORDS + r"\p{N}{1,3}" + _PUNCTUATION_AND_SPACE), ("ByteLevel", False)): "llama-bpe",
    (("Split", _WORDS + r"\p{N}" + _PUNCTUATION_AND_SPACE), ("ByteLevel", False)): "qwen2",
}
# Tokenizer classes that follow tokenizer.json; the class of a model family may split text in another way.
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def refuse_unsupported(files: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a base that certainly cannot be exported as GGUF.

    Args:
        files: The parsed `METADATA_FILES` that exist; a missing file refuses nothing.
    """
    if "config.json" in files:
        architecture(files["config.json"])

    tokenizer = files.get("tokenizer.json")
    # A class of its own may replace the pre-tokenizer of a BPE, which only the loaded tokenizer shows.
    if tokenizer and (_model_type(tokenizer.get("model")) != "BPE" or _tokenizer_class(files) in _GENERIC_CLASSES):
        pre_tokenizer_name(tokenizer)
    if tokenizer and "config.json" in files:
        refuse_tokens_without_embedding(files["config.json"], tokenizer)


def architecture(config: Mapping[str, Any]) -> str:
    """Return the class that a config.json names, one of `ARCHITECTURES`.

    Raises:
        UsageError: If it is none of them, its rotary embeddings are scaled, or GGUF has no place for a setting.
    """
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise UsageError(f"merge.exports: GGUF is written for {', '.join(ARCHITECTURES)}; the base is {name}")

    # transformers 5 writes `rope_parameters`; older config.json files have `rope_scaling`, and the oldest `type`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UsageError(
            f"merge.exports: GGUF is written for rotary embeddings without scaling; the base has {rope_type}"
        )
    for field, value in _FIXED_SETTINGS.items():
        if config.get(field) not in (None, value):
            raise UsageError(
                f"merge.exports: GGUF has no place for {field}: {config[field]}, so the export would be read with "
                f"{value}; remove the gguf exports from the list"
            )
    return str(name)


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json.

    Raises:
        UsageError: If it has none, or the tokenizer is no byte-level BPE.
    """
    node = tokenizer.get("pre_tokenizer") or {}
    parts = node.get("pretokenizers", [node])
    signature = tuple((part.get("type"), _setting(part)) for part in parts)
    if _model_type(tokenizer.get("model")) != "BPE" or signature not in _PRE_TOKENIZERS:
        supported = ", ".join(_PRE_TOKENIZERS.values())
        raise UsageError(
            f"merge.exports: GGUF is written for byte-level BPE with one of the pre-tokenizers {supported}; "
            "the base has another tokenizer"
        )
    return _PRE_TOKENIZERS[signature]


def refuse_tokens_without_embedding(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> None:
    """Raise `UsageError` where a tokenizer.json has a token for which the model has no embedding."""
    added_tokens = ((token["content"], token["id"]) for token in tokenizer.get("added_tokens") or ())
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    token, last_id = max({**vocabulary, **dict(added_tokens)}.items(), key=lambda pair: pair[1], default=("", -1))
    num_embeddings = config.get("vocab_size")
    if num_embeddings is not None and last_id >= num_embeddings:
        raise UsageError(
            f"merge.exports: GGUF needs an embedding for every token; the base has {num_embeddings} embeddings, but "
            f"the last token of its tokenizer, {token!r}, has the id {last_id}"
        )


def _model_type(model: Any) -> str:
    # Files of old versions of tokenizers have no type; the library takes a model with merges for BPE, and so does this.
    fields = model or {}
    return str(fields.get("type", "BPE" if "merges" in fields else "none"))


def _tokenizer_class(files: Mapping[str, Any]) -> str:
    return str((files.get("tokenizer_config.json") or {}).get("tokenizer_class"))


def _setting(part: Mapping[str, Any]) -> Any:
    """Return the setting by which two pre-tokenizers of one type differ; None for a setting that has no name here."""
    if part.get("type") == "Split":
        return part["pattern"].get("Regex") if part.get("behavior") == "Isolated" and not part.get("invert") else None
    if part.get("type") == "Digits":
        return part.get("individual_digits")
    # A prefix space would change the token of the first word.
    return part.get("use_regex", True) if not part.get("add_prefix_space") else None
