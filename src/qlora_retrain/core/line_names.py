"""The names of lines: a DAG's id, a folder of the store and a label in Kubernetes. Standard library only."""

from __future__ import annotations

import re

PATTERN = r"[a-z][a-z0-9-]{0,61}[a-z0-9]"


def is_line_name(name: str) -> bool:
    """Return whether a line may have that name."""
    return bool(re.fullmatch(PATTERN, name))
