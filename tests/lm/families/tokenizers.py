"""Build small real tokenizers of six kinds, and write a model folder for a family of chat templates.

The base tokenizers are trained once a process on a text of our own; a family's marks are then added to a copy.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.lm.families.family import Family

# The word mark of SentencePiece.
WORD_MARK = "\u2581"
TEXT = """The parcel of order 1007 left the warehouse in Lyon on Monday and is on its way to you.
Where is my parcel? I would like to know when it comes, and whether I can still change the address.
You are a helpful assistant of a shop. Be brief, be polite, and answer with one sentence where you can.
user assistant system tool function developer observation instruction response input question answer

def area(width, height):
    if width < 0:
        return None

    return width * height


The weather in Paris is 21 degrees and sunny; in Berlin it rains. {"city": "Paris", "unit": "celsius", "days": 3}
I think that the customer wants a refund, so I look at the order first. Then I write an answer.
Thank you! That helps. What about order 1008, and what does it cost to send it back? It is free.
"""
# As Llama 3 and GPT-4 cut a text into words before the merges.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def write_folder(family: Family, folder: Path) -> Path:
    """Write the family's tokenizer, template, generation config and a tiny model's config."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _with_marks(family)
    tokenizer.save(str(folder / "tokenizer.json"))

    template: Any = family.template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": family.bos,
            "eos_token": family.eos,
            "pad_token": family.eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "chat_template": template,
        },
    )

    configured = family.stops if family.configured is None else family.configured
    stop_ids = [tokenizer.token_to_id(token) for token in configured]
    _write(
        folder / "generation_config.json", {"eos_token_id": stop_ids, "bos_token_id": None, "transformers_version": "5"}
    )
    _write(folder / "config.json", _model_config(tokenizer))
    return folder


def _with_marks(family: Family) -> Tokenizer:
    tokenizer = Tokenizer.from_str(_base_json(family.tokenizer))
    strips = {"lstrip": family.marks_strip == "both", "rstrip": bool(family.marks_strip)}
    named = [t for t in (family.bos, family.eos) if t]
    specials = dict.fromkeys([*named, *family.stops, *family.special])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True, **strips) for t in specials])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in family.plain])

    # A tokenizer of Llama's kind writes its beginning by itself where special tokens are asked for.
    if family.bos and ":" not in family.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))],
        )
    return tokenizer


@cache
def _base_json(kind: str) -> str:
    """Return the trained base tokenizer of one kind as JSON."""
    builders = {
        "byte": lambda: _byte_level(gpt2_cut=False),
        "gpt2": lambda: _byte_level(gpt2_cut=True),
        "spaced": lambda: _byte_level(gpt2_cut=True, is_spaced=True),
        "llama": lambda: _sentencepiece(is_prefixed=True),
        "gemma": lambda: _sentencepiece(is_prefixed=False),
        "metaspace": _metaspace,
    }
    return str(builders[kind]().to_str())


def _byte_level(gpt2_cut: bool, is_spaced: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if gpt2_cut:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=is_spaced)
    else:
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_alone])
    tokenizer.decoder = decoders.ByteLevel()

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 2, trainer=trainer)
    return tokenizer


def _sentencepiece(is_prefixed: bool) -> Tokenizer:
    """Build a BPE over characters with byte fallback, with or without a word mark before every text."""
    spaces = normalizers.Replace(" ", WORD_MARK)
    prefix = [normalizers.Prepend(WORD_MARK)] if is_prefixed else []

    # Trained word by word, so that no piece crosses a word mark or holds a line break.
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Sequence([*prefix, spaces])
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(f"{WORD_MARK}*[^{WORD_MARK}\n]+|\n|{WORD_MARK}+"), "isolated")
    raw.train_from_iterator(TEXT.splitlines(), trainer=trainers.BpeTrainer(vocab_size=600, show_progress=False))

    # The trained pieces, behind one piece for every byte.
    model = json.loads(raw.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: i for i, piece in enumerate([*pieces, *sorted(model["vocab"], key=model["vocab"].get)])}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = raw.normalizer
    cut = [decoders.Strip(" ", 1, 0)] if is_prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *cut]
    )
    return tokenizer


def _metaspace() -> Tokenizer:
    """Build Llama's kind as newer conversions write it: the word mark stands before the whole text alone."""
    tokenizer = _sentencepiece(is_prefixed=True)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=WORD_MARK, prepend_scheme="first", split=False)
    return tokenizer


def _model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
