"""Calls and results that other APIs write as parts of a content, in the OpenAI form.

Read: Anthropic's `tool_use` and `tool_result`, Bedrock's `toolUse` and `toolResult`, Gemini's `functionCall` and
`functionResponse`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from components.validate_data.calls import Tool, parse_calls
from components.validate_data.values import RowFault, is_empty, shorten, text_of

CALLS = ("tool_use", "toolUse", "functionCall", "function_call")
RESULTS = ("tool_result", "toolResult", "functionResponse", "function_response")
_RESULT_KEYS = frozenset("type tool_use_id toolUseId content is_error status name response id cache_control".split())


@dataclass(slots=True)
class SplitContent:
    """A content without its calls and results.

    Attributes:
        content: The parts that are left, as the turn has them.
        calls: The calls, in the OpenAI form.
        results: The turns of the role tool.
    """

    content: list[Any] = field(default_factory=list)
    calls: list[Tool] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)


def split_content(content: object) -> SplitContent | None:
    """Return the parts of a content by what they are; None for a content without calls and results.

    Raises:
        RowFault: If the OpenAI form could not keep their order: a text behind a call or in front of a result.
    """
    parts = content.get("parts") if isinstance(content, Mapping) else content
    if not isinstance(parts, list) or not any(_kind(part, CALLS) or _kind(part, RESULTS) for part in parts):
        return None

    split = SplitContent()
    for part in parts:
        if kind := _kind(part, CALLS):
            split.calls += parse_calls(_call(_inner(part, kind)))
        elif kind := _kind(part, RESULTS):
            if split.content:
                raise RowFault(
                    "bad_content_type", f'a text in front of a part of type "{kind}"; write turns of the role tool'
                )
            split.results.append(_result(_inner(part, kind), kind))
        elif split.calls:
            raise RowFault("bad_content_type", "a text behind a call; write the call as tool_calls of the turn")
        else:
            split.content.append(part)
    return split


def _kind(part: object, kinds: tuple[str, ...]) -> str | None:
    """Return the kind of a part, which is its type or its only key."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type")
    if kind is not None:
        return kind if kind in kinds else None
    return next((name for name in kinds if isinstance(part.get(name), Mapping)), None)


def _inner(part: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    inner = part.get(kind)
    return inner if isinstance(inner, Mapping) else part


def _call(part: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"toolUseId": "id"}
    return {renamed.get(key, key): value for key, value in part.items() if key not in ("type", "cache_control")}


def _result(part: Mapping[str, Any], kind: str) -> dict[str, Any]:
    unread = [key for key, value in part.items() if key not in _RESULT_KEYS and not is_empty(value)]
    if unread:
        raise RowFault("bad_content_type", f'a part of type "{kind}" with the key "{shorten(unread[0])}"')
    value = part.get("content", part.get("response"))
    message = {"role": "tool", "content": _text(value)}
    identifier = part.get("tool_use_id") or part.get("toolUseId") or part.get("id")
    message |= {} if is_empty(part.get("name")) else {"name": text_of(part["name"])}
    return message if is_empty(identifier) else {**message, "tool_call_id": text_of(identifier)}


def _text(value: object) -> str:
    """Return a result as text: its text parts joined, the values of JSON parts and all else as JSON."""
    if value is None:
        return ""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        texts = []
        for item in value:
            if isinstance(item.get("text"), str) and item.get("type") in (None, "text"):
                texts.append(item["text"])
            elif "json" in item and len(item) == 1:
                texts.append(text_of(item["json"]))
            else:
                return text_of(value) if "type" not in item else _refuse(item)
        return "".join(texts)
    return text_of(value)


def _refuse(item: Mapping[str, Any]) -> str:
    raise RowFault("image_content", f'a result with a part of type "{shorten(item["type"])}"')
