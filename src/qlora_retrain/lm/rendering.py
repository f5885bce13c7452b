"""Render a chat by the model's template, and locate in the text what each turn says (`content_spans`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import Problem
from qlora_retrain.lm import bounded
from qlora_retrain.lm.chat_format import DEFAULT_DATE, ChatFormat
from qlora_retrain.lm.content_spans import (
    Chat,
    Message,
    Shape,
    Span,
    contents_of,
    has_marks,
    literals_of,
    reasoning_tags,
    shape_of,
    spans_by_literals,
    spans_by_marks,
    spans_by_search,
    with_marks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[dict[str, Any]] | None
_MAX_SHAPES = 1000
_PROBE = "\ue000a"  # a text that no template holds
MAX_WORDS = 200  # characters of a template's own message that are repeated


class RowRefused(Exception):
    """A row that the chat template cannot carry.

    Attributes:
        reason: A code, e.g. `template_drops_text`.
        detail: Which turn, and what happened to it; never the row's text.
        num_tokens: About how many tokens it has, where that is the reason.
    """

    def __init__(self, reason: str, detail: str, num_tokens: int = 0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.num_tokens = reason, detail, num_tokens


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered chat: its text, and each turn's span by (turn, field); a content that is absent has no span."""

    text: str
    spans: dict[tuple[int, str], Span]
    chat: Chat

    def turn_span(self, turn: int) -> Span | None:
        """Return the span of all that a turn says, reasoning included."""
        spans = [span for (number, _), span in self.spans.items() if number == turn]
        if not spans:
            return None
        return Span(min(s.start for s in spans), max(s.end for s in spans), any(s.is_trimmed for s in spans))


class Renderer:
    """Render chats with one template, its variables and one date."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> None:
        self.tokenizer, self.chat_format = tokenizer, chat_format
        self.uses_parts = False
        self._pinned: dict[str, str] = {}
        # What the template wrote around the contents of the first chat of each shape.
        self._literals: dict[Shape, list[str]] = {}
        # Some templates read contents as a list of parts alone, and turn a string into nothing.
        probe = [{"role": "user", "content": _PROBE}]
        if not self._renders(probe) and self._renders(_as_parts(probe)):
            self.uses_parts = True

    def render(self, chat: Chat, tools: Tools = None, *, add_generation_prompt: bool = False) -> str:
        """Return the chat as text.

        Raises:
            RowRefused: If the template raises, with its own words.
        """
        messages = _as_parts(chat) if self.uses_parts else [dict(turn) for turn in chat]
        try:
            return bounded.render(
                self.tokenizer,
                messages,
                tools=list(tools) if tools else None,
                chat_template=self._template_text(tools),
                add_generation_prompt=add_generation_prompt,
                **self.chat_format.template_kwargs,
            )
        # A bound that was passed, or a request to stop, which says nothing about the row.
        except Problem:
            raise
        # A template is a program of somebody else: whatever it raises says that it cannot render this row.
        except Exception as error:
            words = " ".join(str(error).split())[:MAX_WORDS] or type(error).__name__
            raise RowRefused("template_refuses", f"the chat template raises: {words}") from error

    def locate(self, chat: Chat, tools: Tools = None) -> Rendering:
        """Render a chat, and locate every content in the text."""
        text = self.render(chat, tools)
        contents = contents_of(chat)
        shape = shape_of(chat) if not tools else None
        literals = self._literals.get(shape) if shape else None
        spans = spans_by_literals(text, literals, contents) if literals else None
        if spans is not None:
            return Rendering(text, spans, chat)

        marked: str | None = None
        if not has_marks(contents):
            try:
                marked = self.render(with_marks(chat, contents), tools)
            except RowRefused:
                marked = None
        spans = spans_by_marks(text, marked, contents) if marked is not None else None
        if shape and marked is not None and len(self._literals) < _MAX_SHAPES:
            self._literals[shape] = literals_of(marked)
        return Rendering(text, spans if spans is not None else spans_by_search(text, contents), chat)

    @cached_property
    def answer_mark(self) -> str:
        """What a generation prompt adds to a question, up to reasoning that it opens; empty where it adds nothing."""
        question = [{"role": "user", "content": _PROBE}]
        try:
            text, prompt = self.render(question), self.render(question, add_generation_prompt=True)
        except RowRefused:
            return ""
        mark = prompt.removeprefix(text)
        if mark == prompt:
            return ""
        return min((mark.partition(opening)[0] for opening, _ in reasoning_tags(mark)), key=len).strip()

    def _renders(self, probe: list[Message]) -> bool:
        try:
            return _PROBE in self.render(probe)
        except RowRefused:
            return False

    def _template_text(self, tools: Tools) -> str:
        text = str(self.tokenizer.get_chat_template(None, list(tools) if tools else None))
        if "strftime_now" not in text:
            return text
        # A template is compiled once for each text, so the pinned text is built once too.
        if text not in self._pinned:
            self._pinned[text] = pin_clock(text, self.chat_format.date or DEFAULT_DATE)
        return self._pinned[text]


def pin_clock(template: str, date: str) -> str:
    """Return the template with a `strftime_now` of its own, which knows one day at midnight.

    transformers gives templates a function of that name that reads the clock; a macro of the template comes first.
    """
    import datetime

    day = datetime.date.fromisoformat(date)
    time = datetime.datetime(day.year, day.month, day.day)
    codes = [f"%-{letter}" for letter in "dmHIMSj"] + [f"%{letter}" for letter in "aAbBcdDeFgGHIjmMpPrRSTuUVwWxXyY"]
    replacements = "".join(f"|replace('{code}', '{time.strftime(code)}')" for code in codes)
    # The empty expression keeps the template's first line break, which a block tag would take.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replacements} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def describe_turn(chat: Chat, turn: int) -> str:
    """Name a turn for a message, e.g. `turn 1 (system)`."""
    return f"turn {turn + 1} ({chat[turn]['role']})"


def _as_parts(chat: Chat) -> list[Message]:
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if isinstance(turn.get("content"), str)
        else dict(turn)
        for turn in chat
    ]
