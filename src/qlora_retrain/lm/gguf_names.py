"""What GGUF has a name for, told from a model's JSON files alone: families, rotary embeddings, cuts of text.

A file under a wrong name loads, and answers nonsense, so what has no name here is refused (12): by the plan, before
anything is trained, as far as the files say it for sure, and by `merge_adapter` of the model as transformers loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_retrain.core.errors import UsageError

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
# How a tokenizer cuts text before its merges, and llama.cpp's name for that cut.
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _ENGLISH + r"\p{N}{1,3}" + _REST), ("ByteLevel", False)): "llama-bpe",
    (("Split", _ENGLISH + r"\p{N}" + _REST), ("ByteLevel", False)): "qwen2",
}
# Classes that do as tokenizer.json says; a family's own may cut in another way.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def refuse(files: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a base that surely cannot be written as GGUF.

    Args:
        files: Those of `FILES` that are there, parsed; what is not there refuses nothing.
    """
    if "config.json" in files:
        family(files["config.json"])
    tokenizer = files.get("tokenizer.json")
    if tokenizer and (_type(tokenizer.get("model")) != "BPE" or _class(files) in _PLAIN):
        cut(tokenizer)
    if tokenizer and "config.json" in files:
        embedded(files["config.json"], tokenizer)


def family(config: Mapping[str, Any]) -> str:
    """The class of a config.json, one of `FAMILIES`.

    Raises:
        UsageError: If it is none of them, or its rotary embeddings are scaled.
    """
    name = (config.get("architectures") or ["none"])[0]
    if name not in FAMILIES:
        raise UsageError(f"merge.exports: GGUF is written for {', '.join(FAMILIES)}; the base is {name}")
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = settings.get("rope_type", settings.get("type", "default"))
    if rope != "default":
        raise UsageError(f"merge.exports: GGUF is written for rotary embeddings without scaling; the base has {rope}")
    return str(name)


def cut(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text.

    Raises:
        UsageError: If it has none, or the tokenizer is no byte-level BPE.
    """
    node = tokenizer.get("pre_tokenizer") or {}
    parts = node.get("pretokenizers", [node])
    said = tuple((part.get("type"), _setting(part)) for part in parts)
    if _type(tokenizer.get("model")) != "BPE" or said not in _CUTS:
        known = ", ".join(_CUTS.values())
        raise UsageError(f"merge.exports: GGUF is written for byte-level BPE cut as {known}; the base's is another one")
    return _CUTS[said]


def embedded(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> None:
    """Raise `UsageError` where a tokenizer.json has a token for which the model has no embedding."""
    added = ((token["content"], token["id"]) for token in tokenizer.get("added_tokens") or ())
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    token, last = max({**vocabulary, **dict(added)}.items(), key=lambda pair: pair[1], default=("", -1))
    rows = config.get("vocab_size")
    if rows is not None and last >= rows:
        raise UsageError(
            f"merge.exports: GGUF has an embedding for every token; the base has {rows} and its tokenizer's last, "
            f"{token!r}, is number {last}"
        )


def _type(model: Any) -> str:
    # Old files leave the type out; then it is told from the merges, as tokenizers does.
    found = model or {}
    return str(found.get("type", "BPE" if "merges" in found else "none"))


def _class(files: Mapping[str, Any]) -> str:
    return str((files.get("tokenizer_config.json") or {}).get("tokenizer_class"))


def _setting(part: Mapping[str, Any]) -> Any:
    """What tells two cuts of one type apart."""
    if part.get("type") == "Split":
        return part["pattern"].get("Regex") if part.get("behavior") == "Isolated" and not part.get("invert") else None
    if part.get("type") == "Digits":
        return part.get("individual_digits")
    return part.get("use_regex", True) if not part.get("add_prefix_space") else None
