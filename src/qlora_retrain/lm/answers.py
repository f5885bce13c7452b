"""Cut a rendered chat where its last assistant turn begins and ends, as a model generates it.

The answer begins after the generation prompt; where that prompt opens a reasoning block which the answer lacks, it
begins where the rendered history shows it. It ends with the first token at which generation stops.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_retrain.lm.rendering import (
    REASONING_TAGS,
    Chat,
    Message,
    Renderer,
    Rendering,
    RowRefused,
    Span,
    Tools,
    describe_turn,
)

_REASONING = re.compile(r"think|thought|reason|channel", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """A rendered chat up to the end of its last turn, an assistant's.

    Attributes:
        text: The rendering, up to the end of the answer; an appended end is not in it.
        start: The character at which the answer begins; before it is the prompt.
        appended: The text of the token that ends the answer where the template writes none; None: it is in `text`.
        continues: Whether that token is what the template writes when another turn follows.
        warnings: Codes of what is worth a word.
        spaces: Where contents begin or end with white space, in characters; the marks of some tokenizers take it.
    """

    text: str
    start: int
    appended: str | None = None
    continues: bool = False
    warnings: tuple[str, ...] = ()
    spaces: tuple[tuple[int, int], ...] = ()

    @property
    def with_end(self) -> str:
        """The text with its end, as a longer chat must have it if the two share an example."""
        return self.text + (self.appended or "")


def cut_answer(
    renderer: Renderer, chat: Chat, tools: Tools, stops: Sequence[str], added_tokens: Sequence[str], following: Chat
) -> Answer:
    """Render the chat and find its last turn.

    Args:
        renderer: The line's.
        chat: Ends with an assistant turn.
        tools: What the chat may call.
        stops: The texts of the tokens that end a generation; the first is the one that is appended.
        added_tokens: The texts of all tokens that are no plain text.
        following: The turns after it in the row, if there are any.

    Raises:
        RowRefused: If the template does not carry the chat whole, or its answers cannot end.
    """
    rendering = renderer.locate(chat, tools)
    warnings = check_contents(rendering)
    last = len(chat) - 1
    span = rendering.turn_span(last)
    before = [end for (turn, _), end in _ends(rendering).items() if turn < last]
    previous_end = max(before, default=0)
    # A moved system turn may stand behind; only what precedes the answer counts.
    if span is not None:
        previous_end = max((end for end in before if end <= span.start), default=0)

    prompt = renderer.render(chat[:last], tools, add_generation_prompt=True) if last else ""
    # Before a chat's first turn there is nothing to ask; the answer is what the turn says.
    start = _answer_start(rendering, prompt, span, previous_end) if last or span is None else span.start
    if not rendering.text.startswith(prompt):
        warnings = (*warnings, "answer_start_from_history")

    spaces = _outer_spaces(rendering)
    content_end = span.end if span is not None else start
    end = first_stop(rendering.text, content_end, stops)
    answer_span = Span(span.start if span is not None else start, end or len(rendering.text))
    _refuse_open_reasoning(rendering, answer_span, previous_end)
    if end is not None:
        return Answer(rendering.text[:end], start, warnings=warnings, spaces=spaces)
    return _append_end(renderer, rendering, tools, stops, added_tokens, following, start, warnings, spaces)


def check_contents(rendering: Rendering) -> tuple[str, ...]:
    """Return what was trimmed; refuse a rendering that lacks a content.

    Earlier assistant turns may be shortened: they were whole in the example in which they were the answer.

    Raises:
        RowRefused: If a turn is dropped or rewritten.
    """
    chat, last = rendering.chat, len(rendering.chat) - 1
    is_trimmed = False
    for i, turn in enumerate(chat):
        if turn["role"] == "assistant" and i != last:
            continue
        for name in ("reasoning_content", "content"):
            text = turn.get(name)
            if not isinstance(text, str) or not text.strip():
                continue
            span = rendering.spans.get((i, name))
            if span is None:
                raise _content_fault(rendering, i, name, text)
            is_trimmed = is_trimmed or span.is_trimmed
    return ("trimmed_ends",) if is_trimmed else ()


def first_stop(text: str, start: int, stops: Sequence[str]) -> int | None:
    """Return where the first stop at or after `start` ends, in characters; None where there is none."""
    places = [(place, -len(stop)) for stop in stops if stop and (place := text.find(stop, start)) >= 0]
    if not places:
        return None
    place, negative_length = min(places)
    return place - negative_length


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Return how long the beginning is that both sequences share."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def _outer_spaces(rendering: Rendering) -> tuple[tuple[int, int], ...]:
    places = []
    for span in rendering.spans.values():
        text = rendering.text[span.start : span.end]
        if text[:1].isspace():
            places.append((span.start, span.start + len(text) - len(text.lstrip())))
        if text[-1:].isspace() and text.strip():
            places.append((span.start + len(text.rstrip()), span.end))
    return tuple(places)


def _ends(rendering: Rendering) -> Mapping[tuple[int, str], int]:
    return {key: span.end for key, span in rendering.spans.items()}


def _content_fault(rendering: Rendering, turn: int, name: str, text: str) -> RowRefused:
    description = describe_turn(rendering.chat, turn) + (", its reasoning" if name == "reasoning_content" else "")
    # The same letters in another case, or with other white space, are a rewriting.
    collapsed = "".join(text.split()).casefold()
    if collapsed in "".join(rendering.text.split()).casefold():
        return RowRefused("template_rewrites_text", f"the chat template rewrites the text of {description}")
    return RowRefused("template_drops_text", f"the chat template leaves out text of {description}")


def _answer_start(rendering: Rendering, prompt: str, span: Span | None, previous_end: int) -> int:
    text = rendering.text
    if text.startswith(prompt):
        return len(prompt)

    # Not by one character into the answer, whatever it begins with.
    start = common_length(prompt, text)
    if span is not None:
        start = min(start, span.start)
    for opening, _ in REASONING_TAGS:
        place = prompt.rfind(opening, previous_end)
        if place >= 0:
            start = min(start, place)
    if start < previous_end:
        raise RowRefused(
            "template_rewrites_text",
            "the chat template changes earlier turns when an answer is added, so a model would be trained on another "
            "prompt than it is asked",
        )
    # Otherwise the mark of the answer's turn would be learnt as a part of the answer.
    difference = prompt[start:].strip()
    if difference and not _REASONING.search(difference):
        raise RowRefused(
            "template_rewrites_text",
            f"the chat template asks for an answer with {difference[:40]!r}, which no answer in a chat has before it",
        )
    return start


def _refuse_open_reasoning(rendering: Rendering, span: Span, previous_end: int) -> None:
    """Refuse an answer that the template writes inside a reasoning block that it opened and nobody closes."""
    header, content = rendering.text[previous_end : span.start], rendering.text[span.start : span.end]
    for opening, closing in REASONING_TAGS:
        if header.rfind(opening) <= header.rfind(closing):
            continue
        place = content.find(closing)
        if place < 0 or 0 <= content.find(opening) < place:
            raise RowRefused(
                "answer_inside_reasoning",
                f"the chat template opens {opening} before the answer, and the answer would stand inside of it; turn "
                "reasoning off with data.template_kwargs, e.g. {enable_thinking: false}, or give the rows a reasoning",
            )


def _append_end(
    renderer: Renderer,
    rendering: Rendering,
    tools: Tools,
    stops: Sequence[str],
    added_tokens: Sequence[str],
    following: Chat,
    start: int,
    warnings: tuple[str, ...],
    spaces: tuple[tuple[int, int], ...],
) -> Answer:
    """End an answer after which the template writes no stop at a chat's end."""
    chat, last = rendering.chat, len(rendering.chat) - 1
    span = rendering.turn_span(last)
    has_calls = bool(chat[last].get("tool_calls"))
    tail = rendering.text[span.end :] if span is not None and not has_calls else ""
    if mark := _leading(tail.lstrip(), added_tokens):
        raise RowRefused(
            "answer_end_is_no_stop",
            f"the chat template ends an answer with {mark}, and generation stops at {', '.join(stops)}; add {mark} to "
            "data.stop_tokens if your servers stop there",
        )

    # A model ends an answer right after it, without the white space that a template puts between turns.
    is_bare = span is not None and not has_calls and not tail.strip()
    text = rendering.text[: span.end] if span is not None and is_bare else rendering.text.rstrip()
    if stop := _stop_before_next_turn(renderer, chat, tools, stops, following):
        return Answer(text, start, stop, True, (*warnings, "end_from_next_turn"), spaces)
    warnings = (*warnings, "end_appended")
    if renderer.chat_format.missing_end == "refuse":
        raise RowRefused(
            "answer_has_no_end",
            "the chat template writes no token at which generation stops after an answer; set data.missing_end: append",
        )
    return Answer(text, start, stops[0], False, warnings, spaces)


def _stop_before_next_turn(
    renderer: Renderer, chat: Chat, tools: Tools, stops: Sequence[str], following: Chat
) -> str | None:
    """Return the stop that the template writes right after the last turn once another turn follows it."""
    is_call = bool(chat[-1].get("tool_calls"))
    next_turn: Message = (
        dict(following[0]) if following else {"role": "tool" if is_call else "user", "content": "\ue004"}
    )
    # Its text is hidden, because it might hold what is looked for.
    next_turn = {k: v for k, v in {**next_turn, "content": "\ue004"}.items() if k != "tool_calls"}
    try:
        longer = renderer.locate([*chat, next_turn], tools)
    except RowRefused:
        return None
    span, next_span = longer.turn_span(len(chat) - 1), longer.turn_span(len(chat))
    if next_span is None:
        return None
    if span is not None and not is_call:
        return _leading(longer.text[span.end : next_span.start].lstrip(), stops)
    # Where calls end is not known: the last stop before the next turn's text ends them.
    place = longer.text.rfind("\ue004")
    places = {stop: longer.text.rfind(stop, 0, place) for stop in stops}
    stop = max(places, key=lambda name: places[name])
    return stop if places[stop] >= 0 else None


def _leading(text: str, tokens: Sequence[str]) -> str | None:
    return max((token for token in tokens if token and text.startswith(token)), key=len, default=None)
