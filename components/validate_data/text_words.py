"""Cut a text into the words by which two texts are compared: case, white space, punctuation and marks do not count.

Writing without spaces (Chinese, Japanese, Thai and others) is cut into characters and pairs of neighbours instead.
"""

from __future__ import annotations

import re
import string
import unicodedata
import zlib

import numpy as np
from numpy.typing import NDArray

# A row keeps this many different words, those with the smallest hashes: enough for every text of some 10,000 words.
MAX_WORDS = 4096
# Long texts are cut in parts, so that the memory does not depend on the longest row.
PART_CHARACTERS = 65_536

_ASCII_WORDS = bytes.maketrans(
    (string.punctuation + string.ascii_uppercase).encode(),
    (" " * len(string.punctuation) + string.ascii_lowercase).encode(),
)
# What people add to a question when they ask it again. It says nothing about what they ask.
POLITE_WORDS = frozenset(
    word.encode()
    for word in "hello hi hey dear sir madam team support good morning afternoon evening thanks thank please pls "
    "kindly regards greetings cheers quick question hallo guten tag bitte danke bonjour merci hola gracias ciao".split()
)
# Inside of words these are left out: "don't" is one word, however it is quoted.
_APOSTROPHES = "'\u2018\u2019\u02bc\uff07"
# Thai and Lao, Tibetan and Myanmar, Khmer, kana with their marks, Han; beyond the basic plane: further kana and Han.
_NO_SPACES = (
    "\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U000323af"
)
_CYRILLIC_OR_GREEK, _LATIN = re.compile("[\u0370-\u052f]"), re.compile("[a-z]")
_LOOK_ALIKES = str.maketrans("асеорхуіјѕһԁԛԝαορνικχυτ", "aceopxyijshdqwaopvikxut")
_RUN_WITHOUT_SPACES = re.compile(f"[{_NO_SPACES}]+")


def split_words(text: str) -> list[bytes]:
    """Return the words of the text in their order; those of writing without spaces come last."""
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS, b"'").split()

    folded = _fold(text).translate(_WORD_CHARACTERS)
    # Letters of another script that look like Latin ones hide a word among Latin words only.
    if _CYRILLIC_OR_GREEK.search(folded) and _LATIN.search(folded):
        folded = folded.translate(_LOOK_ALIKES)
    runs = _RUN_WITHOUT_SPACES.findall(folded)
    words = (_RUN_WITHOUT_SPACES.sub(" ", folded) if runs else folded).encode().split()
    for run in runs:
        words += [run[i : i + size].encode() for size in (1, 2) for i in range(len(run) + 1 - size)]
    return words


def cut_words(text: str) -> set[bytes]:
    """Return the different words of the text; a text without any is compared by its characters.

    Of more than `MAX_WORDS` words, those with the smallest hashes are returned, so that two long texts keep the same.
    """
    words: set[bytes] = set()
    for start in range(0, len(text), PART_CHARACTERS):
        words.update(split_words(text[start : start + PART_CHARACTERS]))
        if len(words) > MAX_WORDS:
            words = set(sorted(words, key=_order)[:MAX_WORDS])
    if words:
        return words
    characters = _fold(text[:PART_CHARACTERS])
    return {c.encode() for c in characters if not c.isspace() and not _is_unseen(c)}


def hash_words(words: set[bytes]) -> NDArray[np.uint32]:
    """Return the words' hashes, in no particular order."""
    return np.fromiter(map(zlib.crc32, words), np.uint32, len(words))


def similarity(words: set[bytes], others: set[bytes]) -> float:
    """Return the Jaccard similarity of two sets of words: 1 for equal sets, 0 where nothing is shared.

    Where a set was cut short, it is that of the smallest hashes of the union (Broder 1997), an unbiased estimate.
    """
    if max(len(words), len(others)) < MAX_WORDS:
        num_shared = len(words & others)
        return num_shared / max(1, len(words) + len(others) - num_shared)
    sample = sorted(words | others, key=_order)[:MAX_WORDS]
    return sum(word in words and word in others for word in sample) / len(sample)


def _fold(text: str) -> str:
    """Return the text in one letter case, width and composition."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


class _WordCharacters(dict[int, int | str | None]):
    """Map code points for `str.translate`: letters, marks and digits stay, what is not seen goes, the rest parts words.

    Code points are looked up once, since that is what the time of a text that is not ASCII would go into.
    """

    def __missing__(self, code_point: int) -> int | str | None:
        character = chr(code_point)
        is_of_word = unicodedata.category(character)[0] in "LMN"
        self[code_point] = None if _is_unseen(character) else _base_letter(character) if is_of_word else " "
        return self[code_point]


def _base_letter(character: str) -> str:
    """Return a Latin letter without its accent, and another letter as it is."""
    is_latin = "\u00c0" <= character <= "\u024f" or "\u1e00" <= character <= "\u1eff"
    return unicodedata.normalize("NFD", character)[0] if is_latin else character


_WORD_CHARACTERS = _WordCharacters()


def _is_unseen(character: str) -> bool:
    """Return whether the character is an apostrophe, a format character, a variation selector or half a surrogate."""
    return (
        character in _APOSTROPHES
        or "\ufe00" <= character <= "\ufe0f"
        or "\U000e0100" <= character <= "\U000e01ef"
        or unicodedata.category(character) in ("Cf", "Cs")
    )


def _order(word: bytes) -> tuple[int, bytes]:
    return zlib.crc32(word), word
