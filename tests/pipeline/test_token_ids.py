"""Tokens without an embedding, found in the files; judged by the tokenizer that transformers loads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.pipeline import token_ids
from qlora_retrain.pipeline.token_ids import tokens_without_embedding


def added(content: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}


def write(folder: Path, model: dict[str, Any], extra: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    tokenizer = {"version": "1.0", "added_tokens": extra, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


WORDS = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<unk>": 2}, "unk_token": "<unk>"}
PIECES = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -1.0]], "unk_id": 0}


@pytest.mark.parametrize("vocab_size", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("model", [WORDS, PIECES], ids=["words", "pieces"])
@pytest.mark.parametrize(
    ("extra", "settings"),
    [
        ([], {}),
        ([added("<|im_end|>", 3)], {"eos_token": "<|im_end|>"}),
        ([added("<|a|>", 3), added("<|b|>", 4)], {}),
        # transformers appends what the settings name and the vocabulary lacks.
        ([], {"pad_token": "<pad>"}),
        ([added("<|a|>", 3)], {"pad_token": "<pad>", "additional_special_tokens": ["<x>", "<y>"]}),
        ([], {"pad_token": added("<pad>", 0) | {"__type": "AddedToken"}}),
    ],
)
def test_the_tokens_beyond_the_embedding_are_those_of_the_loaded_tokenizer(
    tmp_path: Path, vocab_size: int, model: dict[str, Any], extra: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    write(tmp_path, model, extra, settings)
    vocabulary = AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    documents = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    actual = tokens_without_embedding({"vocab_size": vocab_size}, documents)
    assert actual == {token: number for token, number in vocabulary.items() if number >= vocab_size}


def documents(*tokens: tuple[str, int], **settings: Any) -> dict[str, Any]:
    return {
        "tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": [added(*token) for token in tokens]},
        "tokenizer_config.json": settings,
    }


def test_a_stand_in_for_images_counts_only_where_something_writes_it() -> None:
    config, token = {"vocab_size": 1}, "<image_soft_token>"
    assert tokens_without_embedding(config, documents((token, 1))) == {}
    assert tokens_without_embedding(config, documents((token, 1), image_token=token)) == {}
    assert tokens_without_embedding(config, documents((token, 1), pad_token=token)) == {token: 1}
    assert tokens_without_embedding(config, documents((token, 1), chat_template=f"x{token}")) == {token: 1}
    assert tokens_without_embedding(config, documents((token, 1)), f"a template with {token}") == {token: 1}
    assert tokens_without_embedding(config, documents(("<|im_start|>", 1))) == {"<|im_start|>": 1}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"vocab_size": 1}, {"x": 1}),
        ({"text_config": {"vocab_size": 1}}, {"x": 1}),
        ({"vocab_size": 9, "text_config": {"vocab_size": 1}}, {"x": 1}),
        ({"vocab_size": 2}, {}),
        ({}, {}),
        ({"vocab_size": None}, {}),
    ],
)
def test_the_embedding_is_that_of_the_language_model(config: dict[str, Any], expected: dict[str, int]) -> None:
    assert tokens_without_embedding(config, documents(("x", 1))) == expected


def test_older_files_are_read_too() -> None:
    config = {"vocab_size": 2}
    slow = {"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<x>": 2}}
    assert tokens_without_embedding(config, slow) == {"<x>": 2}
    decoder = {"tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": "<y>"}}}}
    assert tokens_without_embedding(config, decoder) == {"<y>": 5}
    assert tokens_without_embedding(config, {}) == {}
    # The other tokens are in `tokenizer.model`.
    pieces = {"added_tokens.json": {"<x>": 1}, "tokenizer_config.json": {"bos_token": "<s>", "pad_token": "<x>"}}
    assert tokens_without_embedding(config, pieces) == {}
    assert tokens_without_embedding({"vocab_size": 1}, pieces) == {"<x>": 1}
    assert set(token_ids.FILES) >= {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"}
