"""Give a chat with tool calls the form that the model's template renders whole.

Some templates take a call's arguments as an object, others as JSON text; some look whether a turn with calls has a
content at all. The rendering decides: each form is tried until the text has every call with its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qlora_retrain.lm.content_spans import Chat, Message
from qlora_retrain.lm.rendering import Renderer, RowRefused, Tools, describe_turn


def fit_calls(renderer: Renderer, chat: Chat, tools: Tools) -> list[Message]:
    """Return the chat in a form in which the template writes every tool and every call.

    Raises:
        RowRefused: If the template writes no tools, or renders no form of the calls whole.
    """
    has_calls = any(turn.get("tool_calls") for turn in chat)
    if not has_calls and not tools:
        return list(chat)

    fault: RowRefused | None = None
    for form in _forms(chat) if has_calls else iter([list(chat)]):
        try:
            _check(renderer, form, tools)
        except RowRefused as refusal:
            # Many templates raise on one form of the arguments, which says nothing of the others.
            if fault is None or fault.reason == "template_refuses":
                fault = refusal
        else:
            return form
    assert fault is not None
    raise fault


def _forms(chat: Chat) -> Iterator[list[Message]]:
    """Yield the chat with arguments as objects and as text, each with an empty and without a content."""
    for as_text in (False, True):
        for keep_empty in (True, False):
            yield [_call_turn(turn, as_text, keep_empty) if turn.get("tool_calls") else dict(turn) for turn in chat]


def _call_turn(turn: Message, as_text: bool, keep_empty: bool) -> Message:
    calls = [
        {**call, "function": {**call["function"], "arguments": _arguments(call, as_text)}}
        for call in turn["tool_calls"]
    ]
    result = {**turn, "tool_calls": calls}
    if not keep_empty and not turn.get("content"):
        del result["content"]
    return result


def _arguments(call: dict[str, Any], as_text: bool) -> Any:
    arguments = call["function"]["arguments"]
    return json.dumps(arguments, ensure_ascii=False) if as_text else arguments


def _check(renderer: Renderer, chat: Chat, tools: Tools) -> None:
    """Refuse a rendering that lacks a tool or a call."""
    rendering = renderer.locate(chat, tools)
    # The name of a tool may be in the text as a call's, so the rendering must change with the tools.
    if tools and _renders_alike(renderer, chat, rendering.text):
        raise RowRefused("tools_unsupported", "the chat template writes no tools")
    for tool in tools or ():
        name = str(tool.get("function", tool).get("name"))
        if name not in rendering.text:
            raise RowRefused("tools_unsupported", f'the chat template does not write the tool "{name}"')

    for i, turn in enumerate(chat):
        if not turn.get("tool_calls"):
            continue
        # A name may also be in the list of tools, so only the text between this turn's neighbours counts.
        spans = rendering.spans.items()
        start = max((span.end for (number, _), span in spans if number < i), default=0)
        end = min((span.start for (number, _), span in spans if number > i), default=len(rendering.text))
        region = rendering.text[start:end]
        if (missing := missing_call(turn, region)) is not None:
            raise RowRefused(
                "tools_unsupported",
                f'{describe_turn(chat, i)}: the chat template does not write the call of "{missing}" whole',
            )


def missing_call(turn: Message, text: str) -> str | None:
    """Return the name of the turn's first call that a text lacks, or has without its arguments; None without one."""
    for call in turn.get("tool_calls") or ():
        name, arguments = str(call["function"]["name"]), call["function"]["arguments"]
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
        if name not in text or not _has_arguments(text, value):
            return name
    return None


def _renders_alike(renderer: Renderer, chat: Chat, text: str) -> bool:
    try:
        return renderer.render(chat) == text
    except RowRefused:
        return False


def _has_arguments(region: str, arguments: Any) -> bool:
    """Return whether the text has the arguments, as JSON or each key and value by itself."""
    for separators in ((", ", ": "), (",", ":")):
        if json.dumps(arguments, ensure_ascii=False, separators=separators) in region:
            return True
    # Python's own form of a dict is no JSON, and no server could read such a call.
    if repr(arguments) in region and isinstance(arguments, dict) and arguments:
        return False
    return all(text in region for text in _leaves(arguments))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value if isinstance(value, str) else json.dumps(value)
