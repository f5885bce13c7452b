"""Guess the encoding of bytes that are not UTF-8, for a message: nothing is ever converted by a guess."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

# Encodings by their names for Python and for iconv. The first of equals is taken.
_LATIN = {
    "cp1252": "WINDOWS-1252",
    "cp1250": "WINDOWS-1250",
    "cp1254": "WINDOWS-1254",
    "mac_roman": "MACINTOSH",
    "cp850": "CP850",
}
_OTHER_ALPHABETS = {
    "cp1251": "WINDOWS-1251",
    "koi8_r": "KOI8-R",
    "cp866": "CP866",
    "iso8859_5": "ISO-8859-5",
    "cp1253": "WINDOWS-1253",
}
_EAST_ASIAN = {"euc_jp": "EUC-JP", "cp932": "CP932", "cp949": "CP949", "gb18030": "GB18030", "big5": "BIG5"}
EAST_ASIAN = frozenset(_EAST_ASIAN.values())
_MIN_PLAUSIBILITY = 0.9
# Signs beyond ASCII that ordinary text has; those of the second list also stand between two letters.
_SIGNS = "‘“”…•€\u00a0«»„‚§°£©®™¿¡½±"
_SIGNS_INSIDE = "’–—·´"
_OPENING_SIGNS = "‚„¿¡"  # never right after a letter
_TURKISH = frozenset(b"\xd0\xdd\xde\xf0\xfd\xfe")
_NOT_TURKISH = frozenset(b"\xe1\xe3\xe6\xe9\xed\xf3\xfa")  # of Icelandic, Czech, Romanian and others
# Letters that make up half of a text in Russian or Greek.
_FREQUENT_LETTERS = frozenset("оеаинтсрαιοετσνρ")
_FREQUENT_CHINESE = frozenset("的一是不了在人有我他这這")


def guess_encoding(sample: bytes) -> str | None:
    """Return the encoding, as iconv names it, in which the text reads best; None where it reads well in none."""
    high = sum(byte > 0x7F for byte in sample)
    in_runs = sum(a > 0x7F and b > 0x7F for a, b in pairwise(sample))
    # In Western text, letters beyond ASCII mostly stand alone. In others they follow each other.
    is_western = in_runs <= 0.6 * high
    scores = {}
    for encoding, iconv_name in (_EAST_ASIAN | (_LATIN if is_western else _OTHER_ALPHABETS)).items():
        try:
            text = sample.decode(encoding)
        except UnicodeDecodeError:
            continue
        scores[iconv_name] = _SCORES.get(encoding, _score_letters)(text)

    # Turkish letters read as letters in the other Latin encodings too, but in words of no language.
    if is_western and set(sample) & _TURKISH and not set(sample) & _NOT_TURKISH:
        scores = {name: score for name, score in scores.items() if name == "WINDOWS-1254" or name in EAST_ASIAN}

    best = max(scores, key=lambda name: scores[name], default=None)
    return best if best and scores[best] >= _MIN_PLAUSIBILITY else None


def _score_letters(text: str) -> float:
    """Return the fraction of the characters beyond ASCII that stand where words may have them."""
    triples = zip(" " + text, text, text[1:] + " ", strict=False)
    verdicts = [_is_plausible(before, character, after) for before, character, after in triples if character > "\x7f"]
    return sum(verdicts) / len(verdicts) if verdicts else 0.0


def _is_plausible(before: str, character: str, after: str) -> bool:
    if not character.isalpha():
        if character in _OPENING_SIGNS and before.isalpha():
            return False
        is_inside = before.isalpha() and after.isalpha()
        return character in _SIGNS_INSIDE or (character in _SIGNS and not is_inside)
    # No word has a capital after a small letter.
    if character.isupper() and before.islower():
        return False
    # No word mixes Latin letters with those of another alphabet, which have higher codes.
    return all((letter < "\u0370") == (character < "\u0370") for letter in (before, after) if letter.isalpha())


def _score_other_alphabet(text: str) -> float:
    frequent = _fraction(text, _FREQUENT_LETTERS.__contains__)
    return _score_letters(text) * (0.9 + min(0.1, frequent / 5))


def _is_between(first: str, last: str) -> Callable[[str], bool]:
    return lambda character: first <= character <= last


def _fraction(text: str, test: Callable[[str], bool]) -> float:
    """Return which part of the characters beyond ASCII passes a test."""
    characters = [character for character in text if character > "\x7f"]
    return sum(map(test, characters)) / len(characters) if characters else 0.0


def _score_japanese(text: str) -> float:
    # A third of Japanese text is hiragana; the single-byte katakana of CP932 (from U+FF61) hardly occur.
    is_japanese = _fraction(text, _is_between("\u3040", "\u309f")) > 0.2
    return _fraction(text, _is_between("\u3000", "\u9fff")) if is_japanese else 0.0


def _score_korean(text: str) -> float:
    is_korean = _fraction(text, _is_between("\uac00", "\ud7a3")) > 0.8
    return 1.0 if is_korean else 0.0


def _score_chinese(text: str) -> float:
    chinese = _fraction(text, lambda c: "\u3000" <= c <= "\u303f" or "一" <= c <= "\u9fff" or c >= "\uff00")
    # Text in one of the two encodings often reads as rare characters in the other.
    frequent = _fraction(text, _FREQUENT_CHINESE.__contains__)
    return min(1.0, chinese) * (0.9 + min(0.1, frequent)) if frequent else 0.0


_SCORES: dict[str, Callable[[str], float]] = {
    **dict.fromkeys(_OTHER_ALPHABETS, _score_other_alphabet),
    "euc_jp": _score_japanese,
    "cp932": _score_japanese,
    "cp949": _score_korean,
    "gb18030": _score_chinese,
    "big5": _score_chinese,
}
