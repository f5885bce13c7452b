"""Write the settings of a prompt and its answer as YAML takes them, for messages."""

from __future__ import annotations

from collections.abc import Sequence

from components.validate_data.field_leaves import quoted


def pair_setting(prompt: str, parts: Sequence[str], responses: Sequence[str]) -> str:
    """Return the settings of a prompt, of one or several fields, and its answer, for which there may be a choice."""
    first = f"data.prompt_field: {quoted(prompt)} and data.response_field: {quoted(responses[0])}"
    first = template_setting((prompt, *parts), responses[0]) if parts else first
    return " or ".join([first, *(f"data.response_field: {quoted(path)}" for path in responses[1:])])


def template_setting(fields: Sequence[str], response: str) -> str:
    """Return the settings that make a prompt of several fields, and name its answer."""
    return f"{prompt_template(fields)} and data.response_field: {quoted(response)}"


def prompt_template(fields: Sequence[str]) -> str:
    """Return the setting that makes a prompt of several fields."""
    template = "\\n\\n".join(f"{{{path}}}" for path in fields)
    return f'data.prompt_template: "{template}"'
