"""The names of the aliases that a run moves.

`latest` only moves forward in time. `production` is what runs compare with and consumers pull; it can be rolled back.
`staging` names what waits for a person's approval, where a line asks for it. Standard library only.
"""

from __future__ import annotations

import re

LATEST = "latest"
STAGING = "staging"
PRODUCTION = "production"
_PATTERN = re.compile(r"[a-z][a-z0-9-]{0,31}")


def is_alias_name(name: str) -> bool:
    """Return whether an alias may have that name; no version has one like it."""
    return bool(_PATTERN.fullmatch(name))


def alias_of_run(promote_to: str | None, *, has_approval: bool) -> str | None:
    """Return the alias that a run moves beside `latest`; None: no other.

    Args:
        promote_to: The line's `publish.promote_to`.
        has_approval: The line's `publish.approval`: then a person decides on `promote_to`, and the run moves `staging`.
    """
    return STAGING if has_approval and promote_to is not None else promote_to
