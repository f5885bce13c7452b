"""Tiny tokenizers in the form to which transformers converts SentencePiece: BPE over marked spaces, byte fallback."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

MARK = "\u2581"
TEMPLATES = {
    "always": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}",
    "never": "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
}
TEMPLATES["first"] = TEMPLATES["always"]
TEXTS = [
    "where is the parcel of order number 1003?",
    "my money back of order number 1003",
    "  two spaces, a tab\tand 東京 \U0001f600",
    "the card that was sent is not here\n\n  and the pin is wrong",
]


def write_sentencepiece(folder: Path, prefix: Literal["always", "first", "never"]) -> None:
    """Write a tokenizer of at most 512 tokens, like Llama 2's (always), Mistral's (first) or Gemma's (never)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ends = ["<start_of_turn>", "<end_of_turn>"] if prefix == "never" else []
    tokens = ["<unk>", "<s>", "</s>", *ends, *(f"<0x{i:02X}>" for i in range(256))]
    pieces = _pieces()
    tokens += [*pieces, *sorted(set("".join(pieces)) - set(pieces))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Every pair that gives a token merges, as where transformers converts a SentencePiece file.
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space: Any = normalizers.Replace(" ", MARK)
    if prefix == "first":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="first", split=False)
    else:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), space]) if prefix == "always" else space
    raw.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>", *ends)]
    raw.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATES[prefix]
    tokenizer.save_pretrained(folder)


def _pieces() -> list[str]:
    """Return pieces of the texts, the most frequent first, and several spaces as one piece."""
    text = MARK + f" {' '.join(TEXTS[:2] * 3 + TEXTS[3:])}".replace(" ", MARK).replace("\n", MARK)
    counts: Counter[str] = Counter()
    for length in (2, 3, 4, 5):
        counts.update(
            piece
            for i in range(len(text) - length)
            if MARK not in (piece := text[i : i + length])[1:] and piece.strip("0123456789") == piece
        )
    frequent = [piece for piece, _ in sorted(counts.items(), key=lambda pair: (-pair[1], len(pair[0]), pair[0]))]
    return _reachable([MARK * 2, *frequent[:150]])


def _reachable(pieces: list[str]) -> list[str]:
    """Leave out pieces that no pair of tokens before them gives."""
    reached: list[str] = []
    for piece in pieces:
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        if any(all(len(half) == 1 or half in reached for half in pair) for pair in halves):
            reached.append(piece)
    return reached
