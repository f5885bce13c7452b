"""Find GGUF's names for a model's architecture and tokenizer, from its JSON files alone.

A GGUF file with a wrong name loads but answers nonsense, so a model without a name here is refused (12). The plan
refuses it before training, where the files leave no doubt. `merge_adapter` checks again, on the model as transformers
loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import gguf_families

METADATA_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
# How a tokenizer splits text before its merges (the `pre_tokenizer` of tokenizer.json), and llama.cpp's name for that.
# Both regular expressions must equal those of the models' own files, character by character.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_PUNCTUATION_AND_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Words are also cut before a capital letter in the tokenizers of Phi-4-mini (gpt-4o) and of Mistral Nemo (tekken).
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_START = r"[^\r\n\p{L}\p{N}]?"
_CASED = f"{_START}{_CAPITALS}*{_SMALL}+@|{_START}{_CAPITALS}+{_SMALL}*@|"  # @: what may follow a word
_SPACE_AFTER_CASED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _WORDS + r"\p{N}{1,3}" + _PUNCTUATION_AND_SPACE), ("ByteLevel", False)): "llama-bpe",
    (("Split", _WORDS + r"\p{N}" + _PUNCTUATION_AND_SPACE), ("ByteLevel", False)): "qwen2",
    (("Split", _CASED.replace("@", "") + r"\p{N}" + _SPACE_AFTER_CASED), ("ByteLevel", False)): "tekken",
    (("Split", _CASED.replace("@", _SUFFIX) + r"\p{N}{1,3}" + _SPACE_AFTER_CASED), ("ByteLevel", False)): "gpt-4o",
}
# The normalizer of Qwen's tokenizers, which llama.cpp leaves out.
_COMPOSE = "NFC"
# SentencePiece writes a space as this mark.
SPACE_MARK = "\u2581"
SENTENCEPIECE = "default"
# In a file with this in its name llama.cpp takes away the white space behind added tokens, but not behind these. It
# refuses such a file whose vocabulary lacks one of these, or the end of a text.
PHI_3 = "Marks as in Phi-3"
_UNSTRIPPED_IN_PHI_3 = ("<unk>", "<s>", "<|endoftext|>")
_TOKENS_OF_PHI_3 = (*_UNSTRIPPED_IN_PHI_3, "</s>")
_MAX_NAMED_TOKENS = 5
# Tokenizer classes that follow tokenizer.json; the class of a model family may split text in another way.
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def refuse_unsupported(files: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a base that certainly cannot be exported as GGUF.

    Args:
        files: The parsed `METADATA_FILES` that exist; a missing file refuses nothing.
    """
    if "config.json" in files:
        gguf_families.architecture(files["config.json"])

    tokenizer = files.get("tokenizer.json")
    # A class of its own may replace the pre-tokenizer of a BPE, which only the loaded tokenizer shows.
    if tokenizer and (_model_type(tokenizer.get("model")) != "BPE" or _tokenizer_class(files) in _GENERIC_CLASSES):
        pre_tokenizer_name(tokenizer)
    if tokenizer and "config.json" in files:
        refuse_tokens_without_embedding(files["config.json"], tokenizer)


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json; `SENTENCEPIECE` where it is of that kind.

    Raises:
        UsageError: If it has none.
    """
    if sentencepiece_prefix(tokenizer):
        return SENTENCEPIECE
    if unknown := set(_normalizers(tokenizer)) - {_COMPOSE}:
        raise UsageError(
            f"merge.exports: the base's tokenizer changes text before it cuts it ({', '.join(sorted(unknown))}), which "
            "llama.cpp does not do; remove the gguf exports from the list"
        )
    node = tokenizer.get("pre_tokenizer") or {}
    parts = node.get("pretokenizers", [node])
    signature = tuple((part.get("type"), _setting(part)) for part in parts)
    if _model_type(tokenizer.get("model")) != "BPE" or signature not in _PRE_TOKENIZERS:
        supported = ", ".join(_PRE_TOKENIZERS.values())
        raise UsageError(
            f"merge.exports: GGUF is written for byte-level BPE with one of the pre-tokenizers {supported}, and for "
            "SentencePiece with byte fallback; the base has another tokenizer"
        )
    name = _PRE_TOKENIZERS[signature]
    # One cut, but with llama-bpe llama.cpp takes a word that is a token as it is, without its merges.
    return "dbrx" if name == "llama-bpe" and not tokenizer["model"].get("ignore_merges") else name


def model_name(tokenizer: Mapping[str, Any]) -> str | None:
    """Return the name that a file must have so that llama.cpp reads its chats as the tokenizer does; None: any."""
    added_tokens = tokenizer.get("added_tokens") or ()
    tokens = {*((tokenizer.get("model") or {}).get("vocab") or ()), *(token["content"] for token in added_tokens)}
    # Chats of Phi-3 have a line break behind every mark, which its tokenizer takes away.
    return PHI_3 if any(t.get("rstrip") for t in added_tokens) and tokens.issuperset(_TOKENS_OF_PHI_3) else None


def reading_differences(tokenizer: Mapping[str, Any]) -> list[str]:
    """Return in one sentence each how llama.cpp cuts text otherwise than a tokenizer.json, for the certificate."""
    differences = []
    if not sentencepiece_prefix(tokenizer) and _COMPOSE in _normalizers(tokenizer):
        differences.append(
            "llama.cpp does not compose characters (NFC), and the tokenizer does: text with a letter and its accent as "
            "two characters is read as other tokens than in training; normalize it before it is sent"
        )
    if names := _tokens_with_other_edges(tokenizer):
        text = ", ".join(names[:_MAX_NAMED_TOKENS])
        others = f" and {len(names) - _MAX_NAMED_TOKENS} others" if names[_MAX_NAMED_TOKENS:] else ""
        differences.append(
            f"llama.cpp reads what is beside {text}{others} in another way than the tokenizer, which takes white space "
            "there away or leaves it: text with white space beside them is read as other tokens than in training"
        )
    return differences


def _tokens_with_other_edges(tokenizer: Mapping[str, Any]) -> list[str]:
    """Return the added tokens beside which llama.cpp reads white space, or a word, in another way."""
    is_phi_3, has_prefixes = model_name(tokenizer) is not None, sentencepiece_prefix(tokenizer) == "always"

    def has_other_edge(token: Mapping[str, Any]) -> bool:
        is_stripped = is_phi_3 and token["content"] not in _UNSTRIPPED_IN_PHI_3
        # A token that is searched in the changed text ends no part of it, so that no space is put behind it.
        is_inside = has_prefixes and token.get("normalized")
        is_other = token.get("lstrip") or token.get("single_word") or is_inside
        return bool(is_other) or bool(token.get("rstrip")) != is_stripped

    return [str(t["content"]) for t in tokenizer.get("added_tokens") or () if has_other_edge(t)]


def sentencepiece_prefix(tokenizer: Mapping[str, Any]) -> str | None:
    """Return where a SentencePiece tokenizer puts a space before text: `always`, `first` or `never`.

    None where the tokenizer.json is of another kind. `always` is the beginning of every text between special tokens,
    `first` is the beginning of the whole text.
    """
    model, pre_tokenizer = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer")
    if _model_type(model) != "BPE" or not model.get("byte_fallback"):
        return None
    normalizers = [_space_rule(part) for part in _normalizer_parts(tokenizer)]
    if normalizers in (["prepend", "replace"], ["replace"]) and _cuts_nothing(pre_tokenizer):
        return "always" if "prepend" in normalizers else "never"
    if normalizers or not pre_tokenizer or pre_tokenizer.get("type") != "Metaspace":
        return None
    # A cut at every space would matter to tokens that hold one further behind.
    if pre_tokenizer.get("split") and any(SPACE_MARK in token[1:] for token in model["vocab"]):
        return None
    scheme: str = pre_tokenizer.get("prepend_scheme", "always")
    return scheme if pre_tokenizer.get("replacement") == SPACE_MARK else None


def _normalizer_parts(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    normalizer = tokenizer.get("normalizer") or {}
    parts: list[Mapping[str, Any]] = normalizer.get("normalizers", [normalizer] if normalizer else [])
    return parts


def _normalizers(tokenizer: Mapping[str, Any]) -> list[str]:
    """Return the types of what changes a text before it is cut."""
    return [str(part.get("type")) for part in _normalizer_parts(tokenizer)]


def _space_rule(part: Mapping[str, Any]) -> str | None:
    if part.get("type") == "Prepend" and part.get("prepend") == SPACE_MARK:
        return "prepend"
    is_space = part.get("type") == "Replace" and part.get("pattern") == {"String": " "}
    return "replace" if is_space and part.get("content") == SPACE_MARK else None


def _cuts_nothing(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    # The spaces were replaced before this.
    return not pre_tokenizer or (pre_tokenizer.get("type"), pre_tokenizer.get("pattern")) == ("Split", {"String": " "})


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
