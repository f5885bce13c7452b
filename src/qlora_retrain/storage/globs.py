"""Which of a source's files its patterns mean."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import PurePosixPath


def matches_any(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a relative path matches one of the globs, and none of those that begin with `!`.

    `**` matches every path, and `**/` matches any folders or none. A folder's name matches all that lies in it, and
    `{a,b}` stands for either.
    """
    included = [p for p in patterns if not p.startswith("!")]
    excluded = [p[1:] for p in patterns if p.startswith("!")]
    # Only exclusions: of every file.
    is_included = any(matches(path, p) for p in included) if included else bool(excluded)
    return is_included and not any(matches(path, p) for p in excluded)


def matches(path: str, pattern: str) -> bool:
    """Return whether a relative path matches a glob."""
    if path == pattern:
        return True
    if braces := re.fullmatch(r"(.*?)\{([^{}]*)\}(.*)", pattern):
        return any(matches(path, f"{braces[1]}{choice}{braces[3]}") for choice in braces[2].split(","))

    # Python's globs know no `**` before 3.13, so its common uses are handled here.
    glob = pattern.removeprefix("./").removeprefix("**/")
    is_match = glob == "**" or any(fnmatch.fnmatchcase(path, form) for form in (glob, glob.replace("/**/", "/")))
    is_in_folder = bool(glob.rstrip("/")) and path.startswith(glob.rstrip("/") + "/")
    return is_match or is_in_folder or bool(glob and PurePosixPath(path).match(glob))
