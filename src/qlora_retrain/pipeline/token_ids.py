"""Find the tokens of a tokenizer for which the model has no embedding, from the files of both alone.

Such a token is an index error on a GPU, in the middle of training. A tokenizer has them where tokens were added and the
embedding was not resized.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_retrain.lm.context_length import language_config

FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json")
TEMPLATE_FILES = ("chat_template.jinja",)
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Stand-ins for images and sound. Text models that were cut from a larger one still have them, e.g. Gemma 3 270M.
_PLACEHOLDER = re.compile(r"image|img|vision|video|audio|sound|speech|soft_token", re.IGNORECASE)


def tokens_without_embedding(
    config: Mapping[str, Any], documents: Mapping[str, Any], template: str = ""
) -> dict[str, int]:
    """Return the id of each token that has no row in the embedding; empty where the files do not say.

    Args:
        config: The parsed config.json.
        documents: The parsed ones of `FILES` that exist, by name.
        template: The text of the chat templates that lie in files of their own.
    """
    num_embeddings = language_config(config).get("vocab_size", config.get("vocab_size"))
    if not isinstance(num_embeddings, int):
        return {}

    ids = _ids_by_token(documents)
    roles = set(_role_tokens(documents))
    # transformers appends the tokens of these roles that the vocabulary lacks. A SentencePiece file (`*.model`) has a
    # vocabulary that is not read here, and the tokens may be in it.
    if _vocabulary(documents):
        next_id = max(ids.values(), default=-1) + 1
        missing = [token for token in dict.fromkeys(_named_tokens(documents)) if token not in ids]
        ids |= {token: next_id + i for i, token in enumerate(missing)}

    templates = template + str((documents.get("tokenizer_config.json") or {}).get("chat_template") or "")
    beyond = {token: index for token, index in ids.items() if index >= num_embeddings}
    # Nothing writes a stand-in that neither a role nor the template names.
    return {
        token: index
        for token, index in beyond.items()
        if token in roles or token in templates or not _PLACEHOLDER.search(token)
    }


def added_characters(documents: Mapping[str, Any]) -> int:
    """Return how many characters the added tokens have; the library makes one automaton of them all."""
    tokens = (documents.get("tokenizer.json") or {}).get("added_tokens") or ()
    decoder = (documents.get("tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    return max(sum(len(_content(token)) for token in group) for group in (tokens, decoder.values()))


def _vocabulary(documents: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens with which the tokenizer was trained; empty where no file of JSON has them."""
    model = (documents.get("tokenizer.json") or {}).get("model") or {}
    vocabulary = model.get("vocab") or documents.get("vocab.json") or {}
    # A Unigram vocabulary is a list of pieces with their scores.
    if isinstance(vocabulary, list):
        return {piece: index for index, (piece, *_) in enumerate(vocabulary)}
    return dict(vocabulary)


def _ids_by_token(documents: Mapping[str, Any]) -> dict[str, int]:
    """Return every token of the vocabulary with its id."""
    tokenizer, settings = documents.get("tokenizer.json") or {}, documents.get("tokenizer_config.json") or {}
    ids = _vocabulary(documents)
    if not tokenizer:
        ids |= documents.get("added_tokens.json") or {}
    ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        ids.setdefault(_content(token), int(index))
    return {token: index for token, index in ids.items() if isinstance(index, int)}


def _named_tokens(documents: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tokens that the settings name, in a role or in a list."""
    yield from _role_tokens(documents)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        document = documents.get(name) or {}
        for key in _LISTS:
            value = document.get(key) or ()
            yield from (_content(token) for token in (value.values() if isinstance(value, Mapping) else value))


def _role_tokens(documents: Mapping[str, Any]) -> Iterator[str]:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        document = documents.get(name) or {}
        yield from (_content(document[role]) for role in _ROLES if document.get(role))


def _content(token: Any) -> str:
    """Return a token's text; files write it alone, or as an object with its settings."""
    return str(token.get("content")) if isinstance(token, Mapping) else str(token)
