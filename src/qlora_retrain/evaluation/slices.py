"""What a row belongs to: its label, its prompt's length, its language; told from the row alone, so it never changes.

Lengths are in characters and in powers of two, because contestants may have different tokenizers. The language is what
the data says (`data.language_field`); where it says nothing, the script that most letters are written in, which tells
Japanese from Russian but not Spanish from English.
"""

from __future__ import annotations

import unicodedata
from collections import Counter

from qlora_retrain.lm import chat

_SHORTEST = 32  # characters; whatever is shorter is one slice
_LETTERS_LOOKED_AT = 500


def of(messages: chat.Chat, language: str | None = None, *, labelled: bool) -> tuple[str, ...]:
    """The names of a row's slices; a label only where the answers are a closed set."""
    text = prompt(messages)
    found = [f"length={length(text)}", f"language={language or script(text)}"]
    return tuple([f"label={chat.answer_of(messages)}", *found] if labelled else found)


def prompt(messages: chat.Chat) -> str:
    """What the users said, without the system turn, which is alike in all rows."""
    return "\n".join(turn["content"] for turn in messages if turn["role"] == "user")


def length(text: str) -> str:
    """The characters of a text as a range of powers of two, e.g. `32-63`."""
    low = 1 << max(0, len(text).bit_length() - 1)
    return f"0-{_SHORTEST - 1}" if low < _SHORTEST else f"{low}-{2 * low - 1}"


def script(text: str) -> str:
    """The script of most letters, by their Unicode names, e.g. `latin`, `cyrillic`, `cjk`; `none` without letters."""
    letters = [c for c in text if c.isalpha()][:_LETTERS_LOOKED_AT]
    counts = Counter(unicodedata.name(c, "unknown").split()[0].lower() for c in letters)
    return min(counts, key=lambda name: (-counts[name], name)) if counts else "none"
