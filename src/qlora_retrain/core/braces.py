"""Expand the braces of a glob as Bash does: `{a,b}`, one inside the other, empty choices, and ranges such as `{1..3}`.

Braces that hold neither a comma nor a range are characters like any other, and so is a character behind a backslash.
"""

from __future__ import annotations

import re

# No pattern that a person writes nests deeper.
_MAX_LEVELS = 20
# What makes braces more than two characters.
_CHOICE_MARK = re.compile(r",|\.\.(?!\})")
_NUMBERS = re.compile(r"([-+]?\d+)\.\.([-+]?\d+)(?:\.\.([-+]?\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.([-+]?\d+))?")


def expand(pattern: str, max_words: int) -> list[str]:
    """Return the words that a pattern stands for; one without such braces stands for itself.

    Raises:
        ValueError: If they are more than `max_words`, or nested too deep.
    """
    return _expand(pattern, max_words, 0)


def _expand(text: str, max_words: int, level: int) -> list[str]:
    if level > _MAX_LEVELS:
        raise _too_many(max_words)

    words, tail = [""], text
    while braces := _first_braces(tail):
        start, end = braces
        inside = tail[start + 1 : end]
        parts = _split(inside)
        if len(parts) > 1:
            choices = [word for part in parts for word in _expand(part, max_words, level + 1)]
        else:
            choices = _range(inside, max_words) or [f"{{{inside}}}"]
        if len(words) * len(choices) > max_words:
            raise _too_many(max_words)
        words = [word + tail[:start] + choice for word in words for choice in choices]
        tail = tail[end + 1 :]
    return [word + tail for word in words]


def _too_many(max_words: int) -> ValueError:
    return ValueError(
        f"a glob with too many choices in braces, expected {max_words} at most and {_MAX_LEVELS} levels of braces"
    )


def _first_braces(text: str) -> tuple[int, int] | None:
    """Return the places of the first opening brace that has choices or a range, and of its closing one."""
    position = 0
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == "{" and (end := _closing_brace(text, position)):
            return position, end
        position += 1
    return None


def _closing_brace(text: str, start: int) -> int | None:
    """Return the place of the brace that closes the choices which begin at `start`; None where none does."""
    level, has_choices, position = 0, False, start + 1
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "}" and not level and has_choices:
            return position
        elif character in "{}":
            # A closing brace before any comma is a character of the first choice.
            level = max(0, level + (1 if character == "{" else -1))
        elif not level and _CHOICE_MARK.match(text, position):
            has_choices = True
        position += 1
    return None


def _split(text: str) -> list[str]:
    """Return the parts between the commas that stand in no further braces."""
    parts, level, start, position = list[str](), 0, 0, 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character in "{}":
            level = max(0, level + (1 if character == "{" else -1))
        elif character == "," and not level:
            parts.append(text[start:position])
            start = position + 1
        position += 1
    return [*parts, text[start:]]


def _range(text: str, max_words: int) -> list[str]:
    """Return the numbers or letters of `first..last` or `first..last..step`; nothing for any other text."""
    numbers, letters = _NUMBERS.fullmatch(text), _LETTERS.fullmatch(text)
    if not (match := numbers or letters):
        return []
    first, last = (int(end) if numbers else ord(end) for end in match.groups()[:2])
    step = abs(int(match[3] or 1)) or 1
    values = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    # len() takes no number above 2^63.
    if abs(last - first) // step >= max_words:
        raise _too_many(max_words)
    if not numbers:
        return [chr(value) for value in values]
    # Where an end has leading zeros, all numbers get as many digits.
    has_zeros = any(re.match(r"[-+]?0\d", end) for end in match.groups()[:2])
    width = max(map(len, match.groups()[:2])) if has_zeros else 0
    return [f"{value:0{width}d}" if width else str(value) for value in values]
