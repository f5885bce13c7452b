"""Make the chat of one row, by the layout of its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.validate_data.calls import Tool, is_list_of_calls, parse_calls, parse_tools
from components.validate_data.content import parse_content, refuse_media
from components.validate_data.field_names import has_role, is_turn, is_turns
from components.validate_data.layouts import Layout
from components.validate_data.markers import split_text
from components.validate_data.rendered import AnyStyle
from components.validate_data.turns import Message, TurnParser
from components.validate_data.values import RowFault, is_empty, parsed, shorten, text_of, value_at, without_nulls
from qlora_retrain.config.data import DataConfig


@dataclass(frozen=True, slots=True)
class RowChat:
    """A row's chat.

    Attributes:
        messages: The turns.
        tools: The tools that the row lists.
        pieces: The texts that were read from the row, each as the row has it.
    """

    messages: list[Message]
    tools: list[Tool] | None
    pieces: tuple[str, ...]


def build_chat(fields: Mapping[str, object], layout: Layout, config: DataConfig, parser: TurnParser) -> RowChat:
    """Return the row's chat.

    Raises:
        RowFault: If the row has none.
    """
    tools = None
    for field in layout.tools:
        tools = tools or parse_tools(value_at(fields, field), field)

    if layout.text:
        messages = _text_turns(fields, layout.text, config)
        pieces = [turn["content"] for turn in messages]
    elif layout.chat:
        messages, listed_tools = parser.parse(_chat_value(fields, layout))
        tools = tools or listed_tools
        pieces = [turn["content"] for turn in messages]
    else:
        prompt, pieces, answer = _pair(fields, layout, parser, has_tools=bool(tools))
        reasoning = value_at(fields, layout.reasoning) if layout.reasoning else None
        if not is_empty(reasoning) and answer and answer[-1]["role"] == "assistant":
            answer[-1].setdefault("reasoning_content", text_of(reasoning))
        history = value_at(fields, layout.history) if layout.history else None
        earlier = [] if is_empty(history) else parser.parse(history)[0]
        messages = _join(earlier, prompt, answer)
        pieces = [*pieces, *(turn["content"] for turn in answer)]

    messages = _with_system(messages, fields, layout.system)
    refuse_media(fields, pieces, frozenset(config.ignore_fields))
    return RowChat(messages, tools, tuple(pieces))


def without_padding(fields: Mapping[str, object], layout: Layout, parser: TurnParser) -> dict[str, object]:
    """Return the fields with turns and tools rid of the nulls with which Parquet gives each object the keys of all."""
    heads = {path.partition(".")[0] for path in (layout.chat, *layout.tools) if path}
    return {
        name: without_nulls(value) if name in heads or is_turns(value, parser) else value
        for name, value in fields.items()
    }


def _required(fields: Mapping[str, object], path: str) -> object:
    value = value_at(fields, path)
    if value is None:
        raise RowFault("missing_field", f'the field "{shorten(path)}"')
    return value


def _chat_value(fields: Mapping[str, object], layout: Layout) -> object:
    value = _required(fields, layout.chat or "")
    return value if layout.style is None else _rendered_turns(value, layout.style)


def _rendered_turns(text: object, style: AnyStyle) -> list[dict[str, str]]:
    turns = style.read(text) if isinstance(text, str) else None
    if turns is None:
        raise RowFault("bad_rendering", f"it is not written as {style.name} writes turns")
    return turns


def _text_turns(fields: Mapping[str, object], path: str, config: DataConfig) -> list[Message]:
    text = text_of(_required(fields, path))
    if config.answer_after is None:
        return [{"role": "assistant", "content": text}]
    prompt, answer = split_text(text, config.answer_after, is_label=config.task == "labels")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _pair(
    fields: Mapping[str, object], layout: Layout, parser: TurnParser, *, has_tools: bool
) -> tuple[list[Message], list[str], list[Message]]:
    """Return the prompt's turns, the texts of its fields, and the turns of the answer."""
    answer = _required(fields, layout.response or "")
    if len(layout.prompt_fields) == 1 and layout.is_plain_prompt:
        prompt = _required(fields, layout.prompt_fields[0])
        if layout.style:
            turns = parser.parse(_rendered_turns(text_of(prompt) + text_of(answer), layout.style))[0]
            return turns[:-1], [text_of(prompt)], turns[-1:]
        if isinstance(prompt, str) and layout.has_json_turns:
            prompt, answer = parsed(prompt), _parsed_turns(answer, parser)
        # A role that is not recognised is a fault, and no reason to learn the turns as JSON.
        if isinstance(prompt, list) and prompt and all(map(has_role, prompt)):
            turns = parser.parse(prompt)[0]
            return turns, [turn["content"] for turn in turns], _answer_turns(answer, parser, has_tools=has_tools)

    assert layout.prompt is not None
    texts: dict[str, str] = {}
    for path in layout.prompt_fields:
        value = value_at(fields, path)
        texts[path] = "" if value is None or value in ([], {}) else text_of(value)
    if not any(text.strip() for text in texts.values()):
        raise RowFault("missing_field" if len(texts) > 1 else "empty_content", "the prompt's fields are empty")
    turn = {"role": "user", "content": layout.prompt.fill(texts.__getitem__)}
    return [turn], list(texts.values()), _answer_turns(answer, parser, has_tools=has_tools)


def _parsed_turns(answer: object, parser: TurnParser) -> object:
    """Return the turn or the turns that a text writes as JSON; any other answer as it is.

    Raises:
        RowFault: For a turn with a role that is not recognised.
    """
    value = parsed(answer)
    is_known = is_turns(value, parser) or is_turn(value, parser)
    if not is_known and isinstance(value, Mapping) and "role" in value:
        parser.parse([value])
    return value if is_known else answer


def _answer_turns(value: object, parser: TurnParser, *, has_tools: bool) -> list[Message]:
    """Return the turns of an answer: its own, a call of the row's tools, or one with the value as text."""
    if isinstance(value, list) and is_turns(value, parser):
        return parser.parse(value)[0]
    if is_turn(value, parser):
        return parser.parse([value])[0]
    calls = parsed(value) if has_tools else None
    if calls and is_list_of_calls(calls):
        return [{"role": "assistant", "content": "", "tool_calls": parse_calls(calls)}]
    return [{"role": "assistant", "content": text_of(value)}]


def _join(earlier: Sequence[Message], prompt: Sequence[Message], answer: Sequence[Message]) -> list[Message]:
    """Return the whole chat; preference data may repeat the prompt, or its end, in front of the answer."""
    before = [*earlier, *prompt]
    for length in range(min(len(before), len(answer)), 0, -1):
        if before[-length:] == list(answer[:length]):
            return [*before, *answer[length:]]
    # The prompt alone may be the last question of a longer chat.
    questions = {turn["content"] for turn in answer if turn["role"] == "user"}
    return list(answer) if len(before) == 1 and before[0]["content"] in questions else [*before, *answer]


def _with_system(messages: list[Message], fields: Mapping[str, object], paths: Sequence[str]) -> list[Message]:
    """Return the chat behind the system turn of a field of the row, unless it begins with the same one."""
    value = next((value for path in paths if not is_empty(value := value_at(fields, path))), None)
    if value is None:
        return messages
    text = parse_content(parsed(value) if isinstance(value, str) and value.lstrip().startswith("[{") else value)[0]
    first = messages[0] if messages else {}
    if not text.strip() or (first.get("role") == "system" and first.get("content") == text):
        return messages
    return [{"role": "system", "content": text}, *messages]
