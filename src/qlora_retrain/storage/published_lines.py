"""Which lines have published something in a store; what is said of a name that is none of them."""

from __future__ import annotations

import contextlib
import difflib

from qlora_retrain.core import uris
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.core.line_names import is_line_name
from qlora_retrain.storage.store import Store

_MAX_NAMES = 20


def refuse_other_name(line: str) -> None:
    """Refuse what no line is called, before it becomes a part of a path.

    Raises:
        UsageError: If no line may have that name.
    """
    if not is_line_name(line):
        raise UsageError(f"{line!r}: expected the name of a line alone (small letters, digits and hyphens)")


def no_such_line(store: Store, line: str) -> UsageError:
    """Return the error for a line that has published nothing; it names those that have, the likest first."""
    names: list[str] = []
    # Whoever may read one line alone may not list the others.
    with contextlib.suppress(Problem):
        names = [name for name in store.children("models") if is_line_name(name)]
    likest = difflib.get_close_matches(line, names, _MAX_NAMES)
    listed = list(dict.fromkeys([*likest, *names]))[:_MAX_NAMES]
    hint = f"lines that have: {', '.join(listed)}{', …' if len(names) > len(listed) else ''}"
    return UsageError(
        f"{store.uri}: line {line} has published nothing in this store; "
        + (hint if names else "no other line is to be seen there either: look whether the root is the right one")
    )


def refuse_missing_folder(store: Store) -> None:
    """Refuse a root in a folder that does not exist: a write would make it, and a misspelled one would pass for empty.

    Raises:
        UsageError: If it does not exist.
    """
    if store.uri.startswith("file:") and not uris.local_path(store.uri).is_dir():
        raise UsageError(f"{store.uri}: expected the root of a store, found no such folder; correct --root")
