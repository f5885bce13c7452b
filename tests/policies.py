"""IAM's evaluation of a policy's documents, as far as the rendered ones need it: an explicit Deny wins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Document = dict[str, Any]


def is_allowed(document: Document, action: str, resource: str, context: Mapping[str, str] | None = None) -> bool:
    """Whether an identity's policy allows an action; `context` has the condition keys of the request."""
    effects = _effects(document, action, resource, context or {})
    return "Allow" in effects and "Deny" not in effects


def is_denied(document: Document, action: str, resource: str, context: Mapping[str, str] | None = None) -> bool:
    """Whether a bucket's policy denies an action whatever the identity may do."""
    return "Deny" in _effects(document, action, resource, context or {})


def _effects(document: Document, action: str, resource: str, context: Mapping[str, str]) -> set[str]:
    return {
        statement["Effect"]
        for statement in document["Statement"]
        if _matches(statement["Action"], action)
        and _matches(statement["Resource"], resource)
        and all(_holds(*condition, context) for condition in statement.get("Condition", {}).items())
    }


def _holds(operator: str, keys: Mapping[str, str | list[str]], context: Mapping[str, str]) -> bool:
    """All keys of an operator must hold; a key that the request lacks holds for `Null` alone."""

    def holds(key: str, expected: str | list[str]) -> bool:
        value = context.get(key)
        if operator == "Null":
            return (value is None) is (expected == "true")
        if operator == "StringLike":
            return value is not None and _matches(expected, value)
        if operator in ("Bool", "ForAnyValue:StringEquals"):
            return value is not None and value in ([expected] if isinstance(expected, str) else expected)
        raise AssertionError(f"{operator}: not known here")

    return all(holds(key, expected) for key, expected in keys.items())


def _matches(patterns: str | list[str], text: str) -> bool:
    """`*` matches any characters, also slashes, `?` any one, and `${*}`, `${?}`, `${$}` the character itself."""
    meanings = {"*": ".*", "?": "."}
    regexes = (
        "".join(
            re.escape(part[2]) if part.startswith("${") else meanings.get(part, re.escape(part))
            for part in re.findall(r"\$\{[*?$]\}|.", pattern, re.DOTALL)
        )
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    )
    return any(re.fullmatch(regex, text, re.DOTALL) for regex in regexes)
