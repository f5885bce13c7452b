"""The names of roles: what each is here, and what to set for one that is not recognised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from components.validate_data.values import describe_type, near_match, shorten

_ROLE_NAMES = {
    "system": "system developer",
    "user": "user human customer prompter",
    "assistant": "assistant gpt chatgpt bing bard chatbot bot model ai agent",
    "tool": "tool function observation function_response tool_response tool_result ipython",
    "call": "function_call tool_call tool_calls",
}
ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names.split()}
# What a role that is not recognised probably is; only for a message, since a person should say so.
_LIKELY = {
    "user": "client caller patient student visitor guest buyer seeker asker consumer learner person usr",
    "assistant": "operator doctor teacher advisor adviser support representative rep therapist expert clerk consultant "
    "tutor helper counselor employee staff wizard machine llm response",
}
_LIKELY_ROLES = {name: role for role, names in _LIKELY.items() for name in names.split()}
_MAX_ROLES = 4  # in a message


def role_name(name: str) -> str:
    """Return a role's name as it is compared: without letter case, with `_` between its words."""
    return "_".join(name.casefold().replace("-", " ").replace("_", " ").split())


def describe_unknown(values: Iterable[object], roles: Mapping[str, str]) -> str:
    """Return the roles among the values that are not recognised, with the setting that says what they are."""
    names = [value if isinstance(value, str) else str(value) for value in values if isinstance(value, str | int)]
    unknown = list(dict.fromkeys(name for name in names if role_name(name) not in roles))[:_MAX_ROLES]
    likely = {name: _guess(role_name(name), roles) for name in unknown}
    guesses = _without_gaps(likely, {roles[role_name(name)] for name in names if role_name(name) in roles})

    words = " and ".join(f'"{shorten(name)}"' for name in unknown)
    near = near_match(role_name(unknown[0]), roles, cutoff=0.8)
    hint = f"; did you mean {near}?" if near else ""
    # Without quotes YAML would read a number.
    listing = ", ".join(f"{_quote(shorten(name))}: {role}" for name, role in guesses.items())
    return f"the role {words}{hint}; say what it is, e.g. data.roles: {{{listing}}}"


def unknown_role_words(value: object) -> str | None:
    """Return what is wrong with a role that is no name at all; None for a name."""
    is_name = isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))
    return None if is_name else f"the role is {describe_type(value)}"


def _guess(name: str, roles: Mapping[str, str]) -> str | None:
    likely = _LIKELY_ROLES.get(name) or next((_LIKELY_ROLES[w] for w in name.split("_") if w in _LIKELY_ROLES), None)
    near = near_match(name, roles, cutoff=0.8)
    role = likely or (roles[near] if near else None)
    return "assistant" if role == "call" else role


def _without_gaps(guesses: Mapping[str, str | None], recognised: set[str]) -> dict[str, str]:
    """Return a role for each name: without a guess, who is first asks, unless another name is the user already."""
    result: dict[str, str] = {}
    for name, role in guesses.items():
        present = recognised | set(filter(None, guesses.values())) | set(result.values())
        result[name] = role or ("assistant" if "user" in present else "user")
    return result


def _quote(name: str) -> str:
    return f'"{name}"' if name.lstrip("-").isdecimal() else name
