"""Find in a rendered chat the places of what its turns say.

A template may drop a turn, trim it, rewrite it or move it, and it does so in silence. So a chat is rendered twice: as
it is, and with every content between two marks that no template knows. The second rendering says where the first one
has each content; where the two do not agree, the content is searched for. What the template wrote around the contents
of one chat often is what it writes in the next of the same shape, which then needs no second rendering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Chat = Sequence[Message]
Shape = tuple[tuple[str, tuple[str, ...]], ...]  # of each turn its role, and the names of its texts

# Private-use characters around the number of a content. No template trims, splits or escapes them.
_OPEN, _CLOSE, _NUMBER = "\ue000", "\ue001", 0xE100
_PIECE = re.compile(f"{_OPEN}([{chr(_NUMBER)}-\uf8ff])(.*?){_CLOSE}\\1", re.DOTALL)
_TEXT_FIELDS = ("reasoning_content", "content")
_PLAIN_FIELDS = frozenset(("role", "weight", *_TEXT_FIELDS))
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


def reasoning_tags(text: str) -> list[tuple[str, str]]:
    """Return `REASONING_TAGS`, and the further pairs that a text holds under a family's own name."""
    names = dict.fromkeys(_REASONING_TAG.findall(text))
    return list(dict.fromkeys([*REASONING_TAGS, *((f"<{name}>", f"</{name}>") for name in names)]))


def is_reasoning_tag(text: str) -> bool:
    """Return whether a text is one of the marks around reasoning."""
    return any(text in pair for pair in reasoning_tags(text))


def contents_of(chat: Chat) -> list[Content]:
    """Return every text of the chat in the order in which templates write it: reasoning before the answer."""
    contents = []
    for i, turn in enumerate(chat):
        for name in _TEXT_FIELDS:
            text = turn.get(name)
            if isinstance(text, str) and text:
                contents.append(Content(i, name, text))
    return contents


def with_marks(chat: Chat, contents: Sequence[Content]) -> list[Message]:
    """Return the chat with every content between two marks."""
    marked = [dict(turn) for turn in chat]
    for number, content in enumerate(contents):
        mark = chr(_NUMBER + number)
        marked[content.turn][content.field] = f"{_OPEN}{mark}{content.text}{_CLOSE}{mark}"
    return marked


def shape_of(chat: Chat) -> Shape | None:
    """Return what chats have in common that most templates write alike but for their texts; None with calls."""
    if any(not _PLAIN_FIELDS.issuperset(turn) for turn in chat):
        return None
    return tuple((turn["role"], tuple(name for name in _TEXT_FIELDS if turn.get(name))) for turn in chat)


def literals_of(marked: str) -> list[str]:
    """Return what a rendering with marks has before, between and after its contents."""
    return _PIECE.sub(_OPEN, marked).split(_OPEN)


def has_marks(contents: Sequence[Content]) -> bool:
    """Return whether a content holds one of the marks itself."""
    return any(_OPEN in content.text or _CLOSE in content.text for content in contents)


def spans_by_literals(
    text: str, literals: Sequence[str], contents: Sequence[Content]
) -> dict[tuple[int, str], Span] | None:
    """Return the spans where the text is these literals with the whole contents between them, else None.

    The text is the chat's own rendering, so that no more than the places of equal texts is taken from another chat.
    """
    if len(literals) != len(contents) + 1:
        return None
    spans: dict[tuple[int, str], Span] = {}
    position = 0
    for literal, content in zip(literals, contents, strict=False):
        start = position + len(literal)
        if not (text.startswith(literal, position) and text.startswith(content.text, start)):
            return None
        position = start + len(content.text)
        spans[content.turn, content.field] = Span(start, position)
    return spans if text[position:] == literals[-1] else None


def spans_by_marks(text: str, marked: str, contents: Sequence[Content]) -> dict[tuple[int, str], Span] | None:
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


def spans_by_search(text: str, contents: Sequence[Content]) -> dict[tuple[int, str], Span]:
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
