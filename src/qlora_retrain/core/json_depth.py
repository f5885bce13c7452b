"""How deep a JSON value may be nested, so that code which walks through it by recursion never fails on one.

Python's parser reads about a thousand levels, and a walk takes one or two calls for each of them. Data has ten.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 64


def depth(value: object) -> int:
    """Return how deep lists and objects are nested, without recursion."""
    levels, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list | tuple)]:
        levels += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return levels


def refuse_deep(value: Any) -> Any:
    """Return the value.

    Raises:
        ValueError: If it is nested deeper than `MAX_DEPTH` levels.
    """
    if depth(value) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def loads(text: str | bytes, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is not JSON, or nested deeper than `MAX_DEPTH` levels.
    """
    try:
        return refuse_deep(json.loads(text, parse_constant=parse_constant))
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
