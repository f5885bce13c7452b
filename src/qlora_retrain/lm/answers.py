"""Cut a rendered chat where its last assistant turn begins and ends, as a model generates it.

The answer begins after the generation prompt; where that prompt opens a reasoning block which the answer lacks, it
begins where the rendered history shows it. It ends with the first token at which generation stops.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_retrain.lm.content_checks import check_contents
from qlora_retrain.lm.content_spans import Chat, Message, Span, reasoning_tags
from qlora_retrain.lm.rendering import Renderer, Rendering, RowRefused, Tools, describe_turn
from qlora_retrain.lm.tool_calls import missing_call

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
    start = _answer_start(renderer, rendering, prompt, span, previous_end) if last or span is None else span.start
    if not rendering.text.startswith(prompt):
        warnings = (*warnings, "answer_start_from_history")

    spaces = _outer_spaces(rendering)
    content_end = span.end if span is not None else start
    end = first_stop(rendering.text, content_end, stops)
    answer_span = Span(span.start if span is not None else start, end or len(rendering.text))
    _refuse_open_reasoning(rendering, answer_span, previous_end)
    if end is not None:
        _refuse_call_behind_stop(chat, rendering.text[start:end], stops)
        return Answer(rendering.text[:end], start, warnings=warnings, spaces=spaces)
    return _append_end(renderer, rendering, tools, stops, added_tokens, following, start, warnings, spaces)


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


def _answer_start(renderer: Renderer, rendering: Rendering, prompt: str, span: Span | None, previous_end: int) -> int:
    text = rendering.text
    if text.startswith(prompt):
        return len(prompt)

    # Not by one character into the answer, whatever it begins with.
    start = common_length(prompt, text)
    if span is not None:
        start = min(start, span.start)
    for opening, _ in reasoning_tags(prompt[previous_end:]):
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
    mark = renderer.answer_mark
    place = text.rfind(mark, previous_end, span.start if span is not None else len(text)) if mark else -1
    is_mark_learnt = place + len(mark) > start
    if difference and (is_mark_learnt or not _REASONING.search(difference)):
        raise RowRefused(
            "template_rewrites_text",
            f"the chat template asks for an answer with {difference[:40]!r}, which no answer in a chat has before it",
        )
    return start


def _refuse_open_reasoning(rendering: Rendering, span: Span, previous_end: int) -> None:
    """Refuse an answer that the template writes inside a reasoning block that it opened and nobody closes."""
    header, content = rendering.text[previous_end : span.start], rendering.text[span.start : span.end]
    for opening, closing in reasoning_tags(header):
        if header.rfind(opening) <= header.rfind(closing):
            continue
        place = content.find(closing)
        if place < 0 or 0 <= content.find(opening) < place:
            raise RowRefused(
                "answer_inside_reasoning",
                f"the chat template opens {opening} before the answer, and the answer would stand inside of it; turn "
                "reasoning off with data.template_kwargs, e.g. {enable_thinking: false}, or give the rows a reasoning",
            )


def _refuse_call_behind_stop(chat: Chat, answer: str, stops: Sequence[str]) -> None:
    """Refuse an answer that ends before one of its calls, which no generation would reach."""
    if (name := missing_call(chat[-1], answer)) is not None:
        stop = next((stop for stop in stops if answer.endswith(stop)), stops[0])
        raise RowRefused(
            "tools_unsupported",
            f'{describe_turn(chat, len(chat) - 1)}: the chat template writes the call of "{name}" behind {stop}, at '
            "which generation stops",
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
    # Where calls end is not known.
    content_end = span.end if span is not None and not chat[last].get("tool_calls") else None
    tail = "" if content_end is None else rendering.text[content_end:]
    mark = _leading(tail.lstrip(), added_tokens)
    # What follows a chat's last answer alone, such as a generation prompt that is always written, is no end of it.
    for turns in (following, ()) if mark else (following,):
        if stop := _stop_before_next_turn(renderer, chat, tools, stops, turns):
            text = rendering.text.rstrip() if content_end is None else rendering.text[:content_end]
            return Answer(text, start, stop, turns is following, (*warnings, "end_from_next_turn"), spaces)

    if mark:
        raise RowRefused(
            "answer_end_is_no_stop",
            f"the chat template ends an answer with {mark}, and generation stops at {', '.join(stops)}; add {mark} to "
            "data.stop_tokens if your servers stop there",
        )
    # A model ends an answer right after it, without the white space that a template puts between turns.
    is_bare = content_end is not None and not tail.strip()
    text = rendering.text[:content_end] if is_bare else rendering.text.rstrip()
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
