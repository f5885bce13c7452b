"""The mask begins and ends at the same tokens, whether the tokenizer says where its tokens are or not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_retrain.lm import bounded, chat
from qlora_retrain.lm.chat_format import ChatFormat
from qlora_retrain.lm.example_tokens import Example, ExampleTokenizer

PIECES = [
    "hello",
    " world",
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "\u00e9",
    "\u6f22\u5b57",
    "\U0001f642",
    "'s",
    "123",
    "-",
    ".",
]
PIECES += ["\u00a0", "e\u0301", "\u200b", "{", "<b>", "\uff21"]
HEADS = ["<user>", "<bot>", "<bot>\n", "\nBot: ", "[/INST] ", "<bot> "]


def word_marks() -> PreTrainedTokenizerBase:
    """Return a tokenizer that writes a space as a mark of the word behind it, as SentencePiece does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<user>", "<bot>", "<end>", *alphabet])
    tokenizer.train_from_iterator(["hello world 's 123"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def random_examples(count: int) -> list[Example]:
    """Return examples of two answers each."""
    generator = random.Random(5)

    def text() -> str:
        return "".join(generator.choices(PIECES, k=generator.randint(1, 12)))

    examples = []
    for _ in range(count):
        before, first = "<user>" + text() + generator.choice(HEADS), text() + "<end>"
        between, second = "<user>" + text() + generator.choice(HEADS), text() + "<end>"
        ends = [len(before), len(before + first), len(before + first + between)]
        spans = ((ends[0], ends[1]), (ends[2], ends[2] + len(second)))
        examples.append(Example(before + first + between + second, spans, None, ()))
    return examples


@pytest.mark.parametrize("kind", ["byte level", "word marks"])
def test_places_of_tokens_give_the_mask_that_tokenized_beginnings_give(
    tiny_model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny: Any = chat.load_tokenizer(tiny_model, ChatFormat()).tokenizer
    tokenizer = word_marks() if kind == "word marks" else tiny
    examples, encode = random_examples(300), bounded.encode
    num_texts = 0

    def with_places(tokenizer: Any, texts: list[str], **options: Any) -> Any:
        nonlocal num_texts
        num_texts += len(texts)
        return encode(tokenizer, texts, **options)

    def without_places(tokenizer: Any, texts: list[str], **options: Any) -> list[tuple[list[int], None]]:
        return [(ids, None) for ids, _ in encode(tokenizer, texts, **options)]

    monkeypatch.setattr(bounded, "encode", with_places)
    by_places = ExampleTokenizer(tokenizer, {}).encode([examples])[0]
    # Of the three borders within each example, most need no text of their own.
    assert len(examples) < num_texts < 2.5 * len(examples)
    monkeypatch.setattr(bounded, "encode", without_places)
    by_beginnings = ExampleTokenizer(tokenizer, {}).encode([examples])[0]
    for example, encoded, expected in zip(examples, by_places, by_beginnings, strict=True):
        assert encoded.input_ids == expected.input_ids
        assert encoded.supervised == expected.supervised, repr(example.text)


def test_a_tokenizer_without_places_is_masked_too() -> None:
    example = Example("ab\u00e9cd", ((2, 4),), None, ())
    encoded = ExampleTokenizer(ByT5Tokenizer(), {}).encode([[example]])[0][0]
    assert [chr(i - 3) for i, learnt in zip(encoded.input_ids, encoded.supervised, strict=True) if learnt] == [
        "\u00c3",
        "\u00a9",
        "c",
    ]
