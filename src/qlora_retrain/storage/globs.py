"""Which of a source's files its patterns take: those that Bash would with `globstar`.

`*`, `?` and `[...]` stay within a name, `**` stands for folders at any depth or none, and none of them takes a name
that begins with a dot. Braces are expanded first, and a backslash takes a character as it is. Ours beside Bash: a
pattern that begins with `!` leaves files out, the plain name of a folder takes all that `**` would take in it, and a
file's exact name takes that file.
"""

from __future__ import annotations

import fnmatch
import re
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import PurePosixPath

from qlora_retrain.core import braces

# What the braces of one pattern may stand for.
MAX_CHOICES = 100
_ANY_DEPTH = "**"
_BRACKETS = re.compile(r"\[([!^]?)(\]?(?:\[:\w*:\]|\[\..\.\]|\[=.=\]|\\.|[^\]\\])*+)\]", re.DOTALL)
_ITEM = re.compile(r"\[:(\w*):\]|\[[.=](.)[.=]\]|\\(.)|(.)", re.DOTALL)
_CLASSES: dict[str, Callable[[str], bool]] = {
    "alnum": str.isalnum,
    "alpha": str.isalpha,
    "ascii": str.isascii,
    "blank": lambda c: c in " \t",
    "cntrl": lambda c: ord(c) < 32 or ord(c) == 127,
    "digit": lambda c: c in string.digits,
    "graph": lambda c: c.isprintable() and not c.isspace(),
    "lower": str.islower,
    "print": str.isprintable,
    "punct": lambda c: c.isprintable() and not (c.isspace() or c.isalnum()),
    "space": str.isspace,
    "upper": str.isupper,
    "word": lambda c: c.isalnum() or c == "_",
    "xdigit": lambda c: c in string.hexdigits,
}
_ANY_NAME = re.compile(".*", re.DOTALL)
# A component of a pattern: what a name must match, or `**`.
_Part = re.Pattern[str] | None


def matches_any(path: str, patterns: Sequence[str], *, with_hidden: bool = False) -> bool:
    """Return whether a relative path matches one of the globs, and none of those that begin with `!`.

    Args:
        path: The path, with `/` between its parts.
        patterns: The globs; exclusions alone are of every file.
        with_hidden: Whether `*` and its like take names that begin with a dot too.
    """
    included, excluded = split_exclusions(patterns)
    return any(matches(path, p, with_hidden=with_hidden) for p in included) and not any(
        matches(path, p, with_hidden=True) for p in excluded
    )


def matches(path: str, pattern: str, *, with_hidden: bool = False) -> bool:
    """Return whether a relative path matches a glob."""
    if path == pattern:
        return True
    return any(len(word) in _positions(path, word, with_hidden) for word in _words(pattern))


def may_match_below(folder: str, patterns: Sequence[str]) -> bool:
    """Return whether the globs can take anything in a folder, whatever it holds."""
    included, excluded = split_exclusions(patterns)
    words = [word for pattern in included for word in _words(pattern)]
    is_reached = any(position < len(word) for word in words for position in _positions(folder, word, False))
    is_named = any(PurePosixPath(pattern).is_relative_to(folder) for pattern in included)
    excluding_words = [word for pattern in excluded for word in _words(pattern)]
    return (is_reached or is_named) and not any(_takes_all_below(folder, word) for word in excluding_words)


def matches_name(path: str, names: Sequence[str]) -> bool:
    """Return whether a path has one of the names, in whatever folder it lies; `*` takes any characters."""
    return any(fnmatch.fnmatchcase(path, name) or PurePosixPath(path).match(name) for name in names)


def split_exclusions(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the globs of what is taken, which are of every file where there are none, and of what is left out."""
    excluded = [p[1:] for p in patterns if p.startswith("!")]
    included = [p for p in patterns if not p.startswith("!")]
    return included or ([_ANY_DEPTH] if excluded else []), excluded


def _takes_all_below(folder: str, word: Sequence[_Part]) -> bool:
    start = len(word) - (1 if word[-1] is None else 2)
    return None in word[start:] and start in _positions(folder, word, True)


def _positions(path: str, word: Sequence[_Part], with_hidden: bool) -> set[int]:
    """Return how many components of the word the whole path may have used up."""
    positions = _with_empty_stars({0}, word)
    for name in path.split("/"):
        is_open = with_hidden or not name.startswith(".")
        positions = {
            position if part is None else position + 1
            for position in positions
            if position < len(word)
            for part in [word[position]]
            if (is_open if part is None else _takes(part, name, is_open))
        }
        positions = _with_empty_stars(positions, word)
    return positions


def _with_empty_stars(positions: set[int], word: Sequence[_Part]) -> set[int]:
    """Add the places that are reached where `**` stands for no folder."""
    result = set(positions)
    for position in sorted(positions):
        end = position
        while end < len(word) and word[end] is None:
            end += 1
        result.update(range(position, end + 1))
    return result


def _takes(part: re.Pattern[str], name: str, is_open: bool) -> bool:
    return (is_open or part.pattern.startswith(r"\.")) and part.fullmatch(name) is not None


@lru_cache(maxsize=4096)
def _words(pattern: str) -> tuple[tuple[_Part, ...], ...]:
    """Return the components of each word that a pattern stands for."""
    words = (_components(word) for word in braces.expand(pattern, MAX_CHOICES))
    return tuple(word for word in words if word)


def _components(word: str) -> tuple[_Part, ...]:
    names = [name for name in word.split("/") if name not in ("", ".")]
    if word.startswith("/") or not word:
        return ()
    parts = [None if name == _ANY_DEPTH else re.compile(_regex(name), re.DOTALL) for name in names]
    # With a slash behind it, a name is a folder's alone.
    is_folder = word.rpartition("/")[2] in ("", ".")
    if not any(map(_has_wildcard, names)):
        return (*parts, None, _ANY_NAME) if is_folder else (*parts, None)
    if parts[-1] is None:
        parts.append(_ANY_NAME)
    return () if is_folder else tuple(parts)


def _has_wildcard(name: str) -> bool:
    return re.search(r"[*?]|\[.+\]", re.sub(r"\\.", "", name, flags=re.DOTALL), re.DOTALL) is not None


def _regex(name: str) -> str:
    """Return the regular expression of one component. Its time grows with the product of both lengths at most."""
    parts, position = [""], 0
    while position < len(name):
        character = name[position]
        brackets = _BRACKETS.match(name, position) if character == "[" else None
        if character == "*":
            parts.append("")
        elif character == "?":
            parts[-1] += "."
        elif brackets:
            parts[-1] += _bracket_regex(brackets[1], brackets[2])
            position = brackets.end() - 1
        else:
            # A backslash at the end stands for itself.
            position += character == "\\" and position + 1 < len(name)
            parts[-1] += re.escape(name[position])
        position += 1
    # Each text between two stars is looked for once, at its first place.
    first, *others = parts
    return first + "".join(f"(?>.*?{part})" for part in others[:-1] if part) + (f".*{others[-1]}" if others else "")


def _bracket_regex(negation: str, inside: str) -> str:
    items = [(match[1], match[2] or match[3] or match[4]) for match in _ITEM.finditer(inside)]
    text, position = "", 0
    while position < len(items):
        class_name, character = items[position]
        has_end = position + 2 < len(items) and items[position + 1] == (None, "-") and items[position + 2][1]
        if class_name is not None:
            text += _class_regex(class_name)
        elif has_end:
            last = items[position + 2][1]
            text += f"{re.escape(character)}-{re.escape(last)}" if character <= last else ""
            position += 2
        else:
            text += re.escape(character)
        position += 1
    if not text:
        return "." if negation else r"(?!)"
    return f"[{'^' if negation else ''}{text}]"


@lru_cache
def _class_regex(name: str) -> str:
    """Return the characters of a POSIX class as ranges, for square brackets; none for a name that is no class's."""
    is_member = _CLASSES.get(name)
    if is_member is None:
        return ""
    members = [code for code in range(0x10000) if is_member(chr(code))]
    starts = [code for code in members if code == 0 or not is_member(chr(code - 1))]
    ends = [code for code in members if not is_member(chr(code + 1))]
    return "".join(f"\\u{start:04x}-\\u{end:04x}" for start, end in zip(starts, ends, strict=True))
