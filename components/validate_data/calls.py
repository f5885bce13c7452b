"""Bring tools and calls of tools into the OpenAI form, with a call's arguments as an object.

Read: OpenAI's `tools` and `tool_calls`, its older `functions` and `function_call`, bare functions as Hermes and xLAM
list them, Anthropic's `input_schema`, and any of them as JSON text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.validate_data.values import RowFault, describe_type, is_empty, parse_json, shorten, text_of

Tool = dict[str, Any]
# What a call's arguments are named: by OpenAI, Llama, LangChain and Gemini, and Anthropic.
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")


def parse_tools(value: object, field: str) -> list[Tool] | None:
    """Return the tools, or None where the row has none.

    Raises:
        RowFault: If one of them has no name.
    """
    value = _from_text(value, "bad_tools", f'"{field}"')
    if is_empty(value):
        return None
    # Bedrock's toolConfig.
    if isinstance(value, Mapping) and isinstance(value.get("tools"), list):
        value = value["tools"]
    items = [_from_text(item, "bad_tools", f'"{field}"') for item in (value if isinstance(value, list) else [value])]
    return [_tool(function, field) for item in items for function in _functions(item)]


def parse_calls(value: object) -> list[Tool]:
    """Return the calls of an assistant turn; an empty list where it has none.

    Raises:
        RowFault: If a call has no name, or arguments that are no object.
    """
    value = _from_text(value, "bad_tool_call", "a call")
    if is_empty(value):
        return []
    return [_call(item) for item in (value if isinstance(value, list) else [value])]


def is_list_of_calls(value: object) -> bool:
    """Return whether each item is a name with arguments and nothing else, as the answers of xLAM's rows are."""
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and set(item) - {"id", "type"} in ({"name", key} for key in ARGUMENT_KEYS)
        for item in value
    )


def _functions(item: object) -> Sequence[object]:
    """Return the functions of an item of a list of tools: Gemini has a list in each, and Bedrock an object."""
    if not isinstance(item, Mapping):
        return item if isinstance(item, list) else [item]
    for key in ("functionDeclarations", "function_declarations"):
        if isinstance(item.get(key), list):
            return list(item[key])
    spec = item.get("toolSpec")
    if not isinstance(spec, Mapping):
        return [item]
    schema = spec.get("inputSchema")
    function = {key: value for key, value in spec.items() if key != "inputSchema"}
    return [{**function, "parameters": schema.get("json", schema) if isinstance(schema, Mapping) else schema}]


def _tool(value: object, field: str) -> Tool:
    if not isinstance(value, Mapping):
        raise RowFault("bad_tools", f'"{field}" holds {describe_type(value)} where a tool should be')
    if isinstance(value.get("function"), Mapping):
        tool = {"type": "function", **value, "function": dict(value["function"])}
    else:
        function = {key: item for key, item in value.items() if key != "type"}
        # Anthropic's name of the schema.
        if "input_schema" in function and "parameters" not in function:
            function["parameters"] = function.pop("input_schema")
        tool = {"type": "function", "function": function}

    name = tool["function"].get("name")
    if not isinstance(name, str) or not name.strip():
        keys = ", ".join(shorten(key) for key in list(value)[:5])
        raise RowFault("bad_tools", f'"{field}" holds a tool without a name; its fields are: {keys}')
    return tool


def _call(value: object) -> Tool:
    value = _from_text(value, "bad_tool_call", "a call")
    if not isinstance(value, Mapping):
        raise RowFault("bad_tool_call", f"{describe_type(value)} where a call should be")
    function = value.get("function", value)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name.strip():
        raise RowFault("bad_tool_call", "a call without a name")

    keys = [key for key in ARGUMENT_KEYS if not is_empty(function.get(key))]
    others = [key for key in function if key not in ("name", "id", "type", "index", *ARGUMENT_KEYS)]
    others = [key for key in others if not is_empty(function[key])]
    if len(keys) > 1 or (not keys and others):
        words = " and ".join(f'"{shorten(key)}"' for key in (keys or others)[:2])
        raise RowFault("bad_tool_call", f'the call of "{shorten(name)}" has {words}; expected "arguments"')
    arguments = function[keys[0]] if keys else None
    call: Tool = {"type": "function", "function": {"name": name, "arguments": _arguments(arguments, name)}}
    identifier = value.get("id")
    return call if is_empty(identifier) else {**call, "id": text_of(identifier)}


def _arguments(value: object, name: str) -> dict[str, Any]:
    words = f'the arguments of the call of "{shorten(name)}"'
    value = _from_text(value, "bad_tool_call", words)
    if is_empty(value):
        return {}
    if not isinstance(value, Mapping):
        raise RowFault("bad_tool_call", f"{words} are {describe_type(value)}; expected an object")
    return dict(value)


def _from_text(value: object, reason: str, words: str) -> object:
    """Return the value that a text writes as JSON; what is no text as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return parse_json(value)
    except ValueError:
        raise RowFault(reason, f"{words}: text that is not JSON") from None
