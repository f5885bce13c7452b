"""Assign a row to slices: its label, the length of its prompt, and its language.

Slices depend on the row alone, so they never change. Lengths are ranges of characters in powers of two, because
contestants may have different tokenizers. The language is what the data states (`data.language_field`). Where it states
none, it is the script of most letters, which tells Japanese from Russian but not Spanish from English.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

from qlora_retrain.lm import chat, conversations

_SHORTEST_CHARACTERS = 32  # all prompts shorter than this form one slice
_MAX_LETTERS = 500  # the script is decided by this many letters of the prompt


def slice_names(messages: chat.Chat, language: str | None = None, *, has_labels: bool) -> tuple[str, ...]:
    """Return the names of a row's slices; with a label only where the answers are a closed set."""
    text = user_text(messages)
    names = [f"length={length_range(text)}", f"language={language or dominant_script(text)}"]
    return tuple([f"label={conversations.answer_of(messages)}", *names] if has_labels else names)


def user_text(messages: chat.Chat) -> str:
    """Join the user turns; the system turn is left out, because it is the same in all rows."""
    return "\n".join(turn["content"] for turn in messages if turn["role"] == "user")


def length_range(text: str) -> str:
    """Return the number of characters as a range of powers of two, e.g. `32-63`."""
    # The highest power of two that is not above the length.
    low = 1 << max(0, len(text).bit_length() - 1)
    return f"0-{_SHORTEST_CHARACTERS - 1}" if low < _SHORTEST_CHARACTERS else f"{low}-{2 * low - 1}"


@lru_cache(10_000)
def _script_of(letter: str) -> str:
    return unicodedata.name(letter, "unknown").split()[0].lower()


def dominant_script(text: str) -> str:
    """Return the script of most letters, e.g. `latin`, `cyrillic` or `cjk`; `none` without letters.

    The first word of a letter's Unicode name is its script.
    """
    letters = [c for c in text if c.isalpha()][:_MAX_LETTERS]
    counts = Counter(map(_script_of, letters))
    # Ties are broken by name, so that the slice does not depend on the order of the letters.
    return min(counts, key=lambda name: (-counts[name], name)) if counts else "none"
