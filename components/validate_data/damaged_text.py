"""Find damaged and hidden text: wrong encodings, control characters, and characters that nobody sees.

Every function returns the places in a text as pairs of a start and an end.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from ftfy.badness import is_bad

Spans = Sequence[tuple[int, int]]

# Tabs, line breaks and page breaks are a part of documents.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]+")
# UTF-8 that was read as Windows-1252 or Latin-1, whole: two to four characters that are the bytes of one. Latin-1
# makes control characters (C1) of many bytes, and no text has these for another reason.
_MISREAD = re.compile(
    "[\x80-\x84\x86-\x9f]+|[\u00c2\u00c3][\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d]"
    "|\u00e2(?:\u20ac|\u0080)[\u0080-\u00bf\u2018-\u203a\u0153\u2122\u02dc\u00a6]"
)
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")
_HIDDEN = re.compile(
    "[\U000e0000-\U000e007f]+"  # tags
    "|[\U000e0100-\U000e01ef]{2,}|[\ufe00-\ufe0f]{3,}"  # variation selectors: one belongs to the character before it
    "|[\u200b-\u200d\u2060-\u2064\u180e\ufeff]{4,}"  # runs of zero-width characters spell hidden bits
)
_OVERRIDES, _EMBEDDINGS = re.compile("[\u202d\u202e]"), re.compile("[\u202a-\u202e\u2066-\u2069]")
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
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
    # ftfy knows sequences of further encodings. It says whether there are any, and not where.
    return spans or ([(0, len(text))] if is_bad(text) else ())


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
    if text.isascii() or not _HIDDEN.search(text):
        return ()
    flags = [m.span() for m in _FLAG.finditer(text)]
    spans = (m.span() for m in _HIDDEN.finditer(text))
    return [(start, end) for start, end in spans if not any(f[0] < start and end <= f[1] for f in flags)]


def find_no_visible_text(text: str) -> Spans:
    """Return the whole text where it has characters, and none that can be seen."""
    # The first visible character decides, so that long texts cost nothing.
    is_empty = bool(text) and all(_is_invisible(character) for character in text)
    return [(0, len(text))] if is_empty and not text.isspace() else ()


def _is_invisible(character: str) -> bool:
    # Zs, Zl, Zp: spaces; Cc, Cf: controls and formats; Mn: marks, variation selectors among them.
    return character in _SHAPELESS or unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cc", "Cf", "Mn")
