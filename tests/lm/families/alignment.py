"""Say which characters each token stands for, from the tokens' own texts and without the tokenizer's offsets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.lm.families.tokenizers import WORD_MARK

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Alignment:
    """Where every token stands in a text, in bytes of UTF-8.

    Attributes:
        spans: First byte and end of each token; empty for a word mark that stands for no character.
        swallowed: Bytes that no token stands for, since a mark took white space with it.
    """

    spans: list[tuple[int, int]]
    swallowed: list[tuple[int, int]]


@cache
def byte_of_character() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Return the bytes that a token which was not added stands for."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if byte := BYTE_PIECE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    if WORD_MARK in piece or not all(c in byte_of_character() for c in piece) or not _is_byte_level(tokenizer):
        return str(piece).replace(WORD_MARK, " ").encode()
    return bytes(byte_of_character()[c] for c in piece)


def align(tokenizer: Any, ids: list[int], text: str) -> Alignment | None:
    """Lay the tokens along the text, from its first byte on; None where they are not this text's.

    Tokens may end before the text does.
    """
    remaining, at = text.encode(), 0
    spans, swallowed = [], []
    added = tokenizer.added_tokens_decoder
    for token_id in ids:
        token = added.get(token_id)
        piece = token.content.encode() if token else token_bytes(tokenizer, token_id)

        # Some marks take the white space in front of them.
        if token and token.lstrip and not remaining.startswith(piece, at):
            end = _after_white_space(remaining, at)
            swallowed.append((at, end))
            at = end

        # A word mark in front of a text stands for no character of it.
        if not remaining.startswith(piece, at) and piece.startswith(b" "):
            piece = piece[1:]
        if not remaining.startswith(piece, at):
            return None
        spans.append((at, at + len(piece)))
        at += len(piece)

        if token and token.rstrip and (end := _after_white_space(remaining, at)) > at:
            swallowed.append((at, end))
            at = end
    return Alignment(spans, swallowed)


def byte_offset(text: str, character: int) -> int:
    """Return the byte at which a character of the text begins."""
    return len(text[:character].encode())


def _after_white_space(text: bytes, at: int) -> int:
    # A token may begin within a character, where there is no white space.
    remaining = text[at:].decode(errors="replace")
    return at + len(remaining[: len(remaining) - len(remaining.lstrip())].encode())


@cache
def _is_byte_level(tokenizer: Any) -> bool:
    return "ByteLevel" in type(tokenizer.backend_tokenizer.decoder).__name__
