"""Render a chat by the model's template, and locate in the text what each turn says.

A template may drop a turn, trim it, rewrite it, move it or raise on it, and it does so in silence. So the chat is
rendered twice: as it is, and with every content between two marks that no template knows. The second rendering says
where the first one has each content; where the two do not agree, the content is searched for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import Problem
from qlora_retrain.lm import bounded
from qlora_retrain.lm.chat_format import DEFAULT_DATE, ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Chat = Sequence[Message]
Tools = Sequence[dict[str, Any]] | None
MAX_WORDS = 200  # characters of a template's own message that are repeated

# Private-use characters around the number of a content. No template trims, splits or escapes them.
_OPEN, _CLOSE, _NUMBER = "\ue000", "\ue001", 0xE100
_PIECE = re.compile(f"{_OPEN}([{chr(_NUMBER)}-\uf8ff])(.*?){_CLOSE}\\1", re.DOTALL)
# Reasoning inside of a content, and the marks around it in the families that are in use.
REASONING_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("◁think▷", "◁/think▷"),
    ("<unused94>thought", "<unused95>"),
)
# As `<seed:think>`: a family's own name for one of them.
_REASONING_TAG = re.compile(r"</?((?:\w+:)?(?:think|thinking|thought|reasoning)(?::\w+)?)>")


class RowRefused(Exception):
    """A row that the chat template cannot carry.

    Attributes:
        reason: A code, e.g. `template_drops_text`.
        detail: Which turn, and what happened to it; never the row's text.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Content:
    """One text of a turn that must be in the rendering."""

    turn: int
    field: str  # content or reasoning_content
    text: str


@dataclass(frozen=True, slots=True)
class Span:
    """Where the rendering has a content, in characters."""

    start: int
    end: int
    is_trimmed: bool = False


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
        # Some templates read contents as a list of parts alone, and turn a string into nothing.
        probe = [{"role": "user", "content": f"{_OPEN}a"}]
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
        contents = _contents(chat)
        marked: str | None = None
        if not any(_OPEN in c.text or _CLOSE in c.text for c in contents):
            try:
                marked = self.render(_with_marks(chat, contents), tools)
            except RowRefused:
                marked = None
        spans = _spans_by_marks(text, marked, contents) if marked is not None else None
        return Rendering(text, spans if spans is not None else _spans_by_search(text, contents), chat)

    @cached_property
    def answer_mark(self) -> str:
        """What a generation prompt adds to a question, up to reasoning that it opens; empty where it adds nothing."""
        question = [{"role": "user", "content": f"{_OPEN}a"}]
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
            return f"{_OPEN}a" in self.render(probe)
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


def reasoning_tags(text: str) -> list[tuple[str, str]]:
    """Return `REASONING_TAGS`, and the further pairs that a text holds under a family's own name."""
    names = dict.fromkeys(_REASONING_TAG.findall(text))
    return list(dict.fromkeys([*REASONING_TAGS, *((f"<{name}>", f"</{name}>") for name in names)]))


def is_reasoning_tag(text: str) -> bool:
    """Return whether a text is one of the marks around reasoning."""
    return any(text in pair for pair in reasoning_tags(text))


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


def _contents(chat: Chat) -> list[Content]:
    """Return every text of the chat in the order in which templates write it: reasoning before the answer."""
    contents = []
    for i, turn in enumerate(chat):
        for name in ("reasoning_content", "content"):
            text = turn.get(name)
            if isinstance(text, str) and text:
                contents.append(Content(i, name, text))
    return contents


def _with_marks(chat: Chat, contents: Sequence[Content]) -> list[Message]:
    marked = [dict(turn) for turn in chat]
    for number, content in enumerate(contents):
        mark = chr(_NUMBER + number)
        marked[content.turn][content.field] = f"{_OPEN}{mark}{content.text}{_CLOSE}{mark}"
    return marked


def _as_parts(chat: Chat) -> list[Message]:
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if isinstance(turn.get("content"), str)
        else dict(turn)
        for turn in chat
    ]


def _spans_by_marks(text: str, marked: str, contents: Sequence[Content]) -> dict[tuple[int, str], Span] | None:
    """Walk along both renderings; return None where they are not the same text around the contents."""
    spans: dict[tuple[int, str], Span] = {}
    position = previous_end = 0
    for match in _PIECE.finditer(marked):
        literal = marked[previous_end : match.start()]
        # Half a pair of marks: the template cut a content in two, and only a search can say where it is.
        if _OPEN in literal or _CLOSE in literal or not text.startswith(literal, position):
            return None
        position += len(literal)
        previous_end = match.end()
        content, written = contents[ord(match[1]) - _NUMBER], match[2]
        literal_after = marked[match.end() :].partition(_OPEN)[0]

        # What a template writes once the marks hide the ends of a content from it may differ by white space.
        forms = _forms(content.text) if written == content.text else [(written, False)]
        form = next((f for f in forms if text.startswith(f[0] + literal_after, position)), None)
        if form is None:
            return None
        if written in (content.text, json.dumps(content.text, ensure_ascii=False)[1:-1]):
            spans.setdefault((content.turn, content.field), Span(position, position + len(form[0]), form[1]))
        position += len(form[0])
    literal = marked[previous_end:]
    if _OPEN in literal or _CLOSE in literal or text[position:] != literal:
        return None
    return spans


def _spans_by_search(text: str, contents: Sequence[Content]) -> dict[tuple[int, str], Span]:
    """Search for the contents in order; one that is absent has no span."""
    spans: dict[tuple[int, str], Span] = {}
    position = 0
    for content in contents:
        span = _search(text, content.text, position)
        if span is not None:
            spans[content.turn, content.field] = span
            position = span.end
    return spans


def _search(text: str, content: str, position: int) -> Span | None:
    for form, is_trimmed in _forms(content):
        start = text.find(form, position) if form else -1
        if start >= 0:
            return Span(start, start + len(form), is_trimmed)

    # Templates take a content with reasoning apart and write its parts with white space of their own between them.
    for opening, closing in reasoning_tags(content):
        if closing not in content:
            continue
        before, _, answer = content.rpartition(closing)
        lead, tag, reasoning = before.partition(opening) if opening in before else ("", "", before)
        parts = [part for part in (lead.strip(), tag, reasoning.strip(), closing, answer.strip()) if part]
        match = re.compile(r"\s*".join(map(re.escape, parts))).search(text, position)
        return Span(match.start(), match.end(), is_trimmed=True) if match else None
    return None


def _forms(text: str) -> list[tuple[str, bool]]:
    """Return the text and its trimmed forms, the longest first; the flag says whether it is trimmed."""
    forms = dict.fromkeys((text, text.rstrip("\n"), text.lstrip("\n"), text.rstrip(), text.lstrip(), text.strip()))
    return [(form, form != text) for form in sorted(forms, key=len, reverse=True)]
