"""Say which files a source has that its patterns just miss, and which pattern would take them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from qlora_retrain.storage import globs

_MAX_NAMES = 5
# A source may have a million files, and a line a hundred patterns.
_MAX_SAMPLE = 10_000


def explain_no_match(paths: Sequence[str], patterns: Sequence[str]) -> str:
    """Return a clause for a message about patterns that take none of the files of a source."""
    if not paths:
        return "; it is empty"
    count = f"it has {len(paths):,} files" if len(paths) > 1 else "its one file is"
    included, excluded = globs.split_exclusions(patterns)
    sample = paths[:_MAX_SAMPLE]
    for candidate in _candidates(included, sample):
        choice = [candidate, *(f"!{pattern}" for pattern in excluded)]
        if any(globs.matches_any(path, choice) for path in sample):
            matching = [path for path in paths if globs.matches_any(path, choice)]
            return f"; {count}: {_listing(matching, paths)}; {candidate} takes {len(matching):,} of them"
    if any(globs.matches_any(path, included) for path in sample):
        left_out = ", ".join(f"!{pattern}" for pattern in excluded)
        return f"; {count}: {_listing(list(paths), paths)}; {left_out} leaves all of them out"
    name = PurePosixPath(included[0]).name if included else ""
    # The likest first, and then all others.
    nearest = list(dict.fromkeys([*difflib.get_close_matches(name, sample, _MAX_NAMES), *sorted(sample)]))
    return f"; {count}: {_listing(nearest, paths)}; ** takes every file whose name does not begin with a dot"


def _candidates(patterns: Sequence[str], paths: Sequence[str]) -> Iterator[str]:
    """Yield what a person may have meant, the likeliest first."""
    for pattern in patterns:
        yield f"**/{pattern.removeprefix('./').removeprefix('**/')}"
        yield f"{pattern.rstrip('/')}/**"
        yield f"{pattern}*"
        yield f"**/{PurePosixPath(pattern).name}"
    suffixes = {PurePosixPath(pattern).suffix for pattern in patterns} - {"", ".*"}
    for suffix in sorted({PurePosixPath(path).suffix for path in paths}):
        # JSONL in the place of jsonl.
        if suffix not in suffixes and suffix.lower() in {name.lower() for name in suffixes}:
            yield f"**/*{suffix}"
    if any(globs.matches_any(path, patterns, with_hidden=True) for path in paths):
        yield "**/.*"


def _listing(names: Sequence[str], paths: Sequence[str]) -> str:
    listed = ", ".join(names[:_MAX_NAMES])
    return f"{listed}, …" if len(paths) > len(names[:_MAX_NAMES]) else listed
