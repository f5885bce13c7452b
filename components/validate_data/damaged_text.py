"""Find damaged and hidden text: wrong encodings, control characters, and characters that nobody sees.

Every function returns the places in a text as pairs of a start and an end.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from ftfy.badness import is_bad

Spans = Sequence[tuple[int, int]]

# Tabs, line breaks and page breaks are a part of documents. The last two are no characters at all.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufdd0-\ufdef\ufffe\uffff]+")
# UTF-8 that was read as Windows-1252 or Latin-1, whole: two to four characters that are the bytes of one. Latin-1
# makes control characters (C1) of many bytes, and no text has these for another reason.
_MISREAD = re.compile(
    "[\x80-\x84\x86-\x9f]+|[\u00c2\u00c3][\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d]"
    "|\u00e2(?:\u20ac|\u0080)[\u0080-\u00bf\u2018-\u203a\u0153\u2122\u02dc\u00a6]"
    # Signs within a word: an umlaut of another system, or an apostrophe that was lost.
    "|(?<=[A-Za-z])[§¶†‡‰¤¥¢¦¹³¼½¾¿▀▄](?=[a-z])"
    # A Greek or Cyrillic letter within a Latin word: a wrong code page, or a letter that only looks alike.
    "|(?<=[A-Za-z])[\u0370-\u03ff\u0400-\u04ff]{1,2}(?=[a-z])"
    # An umlaut in UTF-8, read as Shift-JIS.
    "|(?<=[A-Za-z])\uff83.|\uff83.(?=[a-z])"
)
# Letters of another alphabet that were read as Latin-1: no language has four in a row, unless one is repeated.
_ACCENTED = re.compile("[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff]{4,}")
_MIN_DIFFERENT = 3
# KOI8-R that was read as Windows-1251 changes small letters into capitals.
_SWAPPED_CASE = re.compile(r"\b[а-яё][А-ЯЁ]{2,}\b")
# Encodings that UTF-8 is read as by mistake, beside those above.
_ENCODINGS = (
    "cp1251", "mac_roman", "cp1253", "koi8_r", "cp850", "cp437", "iso8859_2", "cp1250", "cp866"
)  # fmt: skip
_MIN_MISREAD_FRACTION = 0.7  # of the characters that are not ASCII
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")
_HIDDEN = re.compile(
    "[\U000e0000-\U000e007f]+"  # tags
    "|[\U000e0100-\U000e01ef]{2,}|[\ufe00-\ufe0f]{3,}"  # variation selectors: one belongs to the character before it
    "|(?:^|(?<=[A-Za-z]))[\ufe00-\ufe0f\U000e0100-\U000e01ef]+"  # and letters have none
    "|[\u200b-\u200d\u2060-\u2064\u206a-\u206f\u180e\ufeff\u034f]{3,}"  # runs without width spell bits
    "|(?<=[^\\s\u115f\u1160\u3164\uffa0])[\u115f\u1160\u3164\uffa0]{2,}|[\ufff9-\ufffb]+|[\U0001d173-\U0001d17a]+"
)
# A character that nobody sees within a word of Latin letters: twice, it is no accident.
_WITHIN_WORD = re.compile("(?<=[A-Za-z0-9])[\u200b-\u200d\u2060-\u2064\u206a-\u206f\ufeff\u034f]+(?=[A-Za-z0-9])")
_OVERRIDES = re.compile("[\u202d\u202e]")
_EMBEDDINGS = re.compile("[\u202a-\u202e\u2066-\u2069\u200f\u061c]")
_RIGHT_TO_LEFT = re.compile("[\u0590-\u061b\u061d-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
# Letters without a shape: Hangul fillers, Khmer inherent vowels, the empty Braille pattern.
_SHAPELESS = frozenset("\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")


def find_replacement_characters(text: str) -> Spans:
    """Return where bytes could not be read."""
    return [m.span() for m in re.finditer("\ufffd+", text)] if "\ufffd" in text else ()


def find_mojibake(text: str) -> Spans:
    """Return where text was read in a wrong encoding; the whole text where it is only known to be."""
    if text.isascii():
        return ()
    spans = [m.span() for m in _MISREAD.finditer(text)]
    spans += [m.span() for m in _ACCENTED.finditer(text) if len(set(m.group().casefold())) >= _MIN_DIFFERENT]
    # ftfy knows sequences of further encodings. It says whether there are any, and not where.
    is_damaged = not spans and (is_bad(text) or _is_misread_utf8(text) or len(_SWAPPED_CASE.findall(text)) > 1)
    return [(0, len(text))] if is_damaged else spans


def _is_misread_utf8(text: str) -> bool:
    """Return whether nearly all that is not ASCII has the form of UTF-8 that was read in one of the encodings."""
    others = re.sub("[\x00-\x7f]+", " ", text)
    least = _MIN_MISREAD_FRACTION * (len(others) - others.count(" "))
    return any(sum(map(len, pattern.findall(others))) >= max(2, least) for pattern in _misread_patterns())


@lru_cache(1)
def _misread_patterns() -> list[re.Pattern[str]]:
    """Return for each encoding the pattern of a character of UTF-8, read byte by byte."""
    patterns = []
    for encoding in _ENCODINGS:
        characters = [bytes([b]).decode(encoding, "replace") for b in range(256)]
        # The bytes that continue a character, that begin a Latin, Greek or Cyrillic letter, and that begin three bytes.
        continuing, two_bytes, three_bytes = (
            "".join(re.escape(characters[b]) for b in codes).replace("\ufffd", "")
            for codes in (range(0x80, 0xC0), (0xC2, 0xC3, 0xC4, 0xC5, 0xCE, 0xCF, 0xD0, 0xD1), range(0xE0, 0xF0))
        )
        patterns.append(re.compile(f"[{two_bytes}][{continuing}]|[{three_bytes}][{continuing}]{{2}}"))
    return patterns


def find_control_characters(text: str) -> Spans:
    """Return the characters that no text needs."""
    return () if text.isprintable() else [m.span() for m in _CONTROL.finditer(text)]


def find_bidi_characters(text: str) -> Spans:
    """Return the characters that reverse a text's direction.

    Text in Arabic or Hebrew has embeddings for good reasons, but nothing has one for an override.
    """
    if text.isascii() or not _EMBEDDINGS.search(text):
        return ()
    pattern = _OVERRIDES if _RIGHT_TO_LEFT.search(text) else _EMBEDDINGS
    return [m.span() for m in pattern.finditer(text)]


def find_invisible_tags(text: str) -> Spans:
    """Return the runs of characters that nobody sees and that a tokenizer reads; the flags of regions are none."""
    if text.isascii():
        return ()
    flags = [m.span() for m in _FLAG.finditer(text)]
    spans = [m.span() for m in _HIDDEN.finditer(text)]
    within = [m.span() for m in _WITHIN_WORD.finditer(text)]
    spans += within if len(within) > 1 else []
    return [(start, end) for start, end in spans if not any(f[0] < start and end <= f[1] for f in flags)]


def find_no_visible_text(text: str) -> Spans:
    """Return the whole text where it has characters, and none that can be seen."""
    # The first visible character decides, so that long texts cost nothing.
    is_empty = bool(text) and all(_is_invisible(character) for character in text)
    return [(0, len(text))] if is_empty and not text.isspace() else ()


def _is_invisible(character: str) -> bool:
    # Zs, Zl, Zp: spaces; Cc, Cf: controls and formats; Mn: marks, variation selectors among them.
    return character in _SHAPELESS or unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cc", "Cf", "Mn")
