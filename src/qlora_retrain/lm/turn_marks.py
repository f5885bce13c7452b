"""Learn with which marks a template writes turns, and recognise them in a text, where they would forge a turn.

A mark is what the template writes around a content: a token of any kind, or plain text such as `[/INST]` or `User:`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from qlora_retrain.lm import bounded
from qlora_retrain.lm.content_spans import Message, is_reasoning_tag
from qlora_retrain.lm.rendering import Renderer, RowRefused
from qlora_retrain.lm.tool_calls import fit_calls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTENT = "\ue003"
_SYSTEM = {"role": "system", "content": _CONTENT}
_USER, _ASSISTANT = {"role": "user", "content": _CONTENT}, {"role": "assistant", "content": _CONTENT}
_CHATS: tuple[list[Message], ...] = (
    [_SYSTEM, _USER, _ASSISTANT, _USER, _ASSISTANT, _USER],
    [_USER, _ASSISTANT, _USER, _ASSISTANT, _USER],
    [_SYSTEM, _USER, _ASSISTANT],
    [_USER, _ASSISTANT],
)
_PARAMETERS = {"type": "object", "properties": {"q": {"type": "string"}}}
# A result's own marks stand right before it; further in front are those of the call.
_RESULT_MARK_CHARACTERS = 60
_WORD_MARK = "\u2581"
_BRACKETED = re.compile(r"<[^<>\s][^<>\n]*>|\[/?[^\[\]\s][^\[\]\n]*\]|<<[^<>\n]+>>")


class TurnMarks:
    """The marks of one template and tokenizer.

    Attributes:
        tokens: Tokens, and marks in brackets; they forge a turn wherever they stand.
        lines: Plain text; it forges a turn at the start of a line, so that an honest "User:" in a sentence passes.
        inline: Plain text that the template writes behind a content on the same line; it forges a turn anywhere.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend: Any = backend
        self._normalizer = backend.normalizer if backend is not None else None
        self._may_lengthen = type(self._normalizer).__name__ not in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip")
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        special = {text for text, is_special in added.items() if is_special} | set(tokenizer.all_special_tokens)
        tool_tokens = _tool_marks(renderer, added)

        by_length = sorted((text for text in added if text.strip()), key=len, reverse=True)
        token_pattern = re.compile("|".join(map(re.escape, by_length))) if by_length else None
        tokens, lines, inline = set(special), set[str](), set[str]()
        for literal, is_beside_system in _literals(renderer):
            parts = token_pattern.split(literal) if token_pattern else [literal]
            tokens |= set(token_pattern.findall(literal) if token_pattern else [])
            for i, part in enumerate(parts):
                tokens |= set(_BRACKETED.findall(part))
                # Beside a token, the text around a system turn may be a heading, as gpt-oss's `# Instructions`.
                if is_beside_system and (len(parts) > 1 or _BRACKETED.search(part)):
                    continue
                marks = _plain_marks(part, is_whole=len(parts) == 1)
                lines |= set(marks.values())
                # Right behind a content, with no line break between them.
                if i == 0 and 0 in marks and not _BRACKETED.match(part.lstrip()):
                    inline.add(marks[0])

        # Reasoning is a part of an answer and no turn; only a special token of it is markup everywhere.
        self.tokens = {text for text in tokens if text.strip() and (text in special or not is_reasoning_tag(text))}
        self.lines, self.inline = lines, inline
        # A tool's own text and an answer may hold the marks of tools: many data sets write calls as text.
        self._patterns = {
            "user": _pattern(self.tokens | tool_tokens, lines, inline),
            "tool": _pattern(self.tokens, lines, inline),
            "assistant": _pattern({text for text in self.tokens if not is_reasoning_tag(text)}, lines, inline),
        }

    def find(self, text: str, role: str = "user") -> str | None:
        """Return the first mark in a text, or None; an assistant's text may hold reasoning marks."""
        pattern = self._patterns.get(role, self._patterns["user"])
        if pattern is None:
            return None
        match = pattern.search(text) or pattern.search(self._as_tokenized(text))
        return match[0].strip() if match else None

    def _as_tokenized(self, text: str) -> str:
        """Return the text as the tokenizer reads it: in its normal form, and with SentencePiece's word mark a space."""
        if self._normalizer is None:
            return text.replace(_WORD_MARK, " ")
        # The normalizer keeps Python's lock, so that nothing could end it; the whole tokenizer lets other threads run.
        if self._may_lengthen:
            with bounded.tokenizer_bounds(len(text)):
                self._backend.encode_batch([text], add_special_tokens=False)
        normal: str = self._normalizer.normalize_str(text)
        return normal.replace(_WORD_MARK, " ")


def _literals(renderer: Renderer) -> list[tuple[str, bool]]:
    """Return the texts that the template writes between contents in honest chats, and in its generation prompt.

    The flag says whether a text stands beside a system turn, or opens the chat.
    """
    literals: list[tuple[str, bool]] = []
    has_many_turns = False
    for chat in _CHATS:
        # A short chat is only needed where the template raises on the long ones.
        if has_many_turns and len(chat) < 5:
            continue
        for prompt in (False, True):
            try:
                parts = renderer.render(chat, add_generation_prompt=prompt).split(_CONTENT)
            except RowRefused:
                continue
            # The text before the first content may be a default system turn, which is prose and no mark.
            opening = parts[0].rstrip().rpartition("\n")[2]
            # A line break in front of it says that no content precedes the opening.
            if len(parts) > 1:
                has_system = chat[0]["role"] == "system"
                literals.append((f"\n{opening}", True))
                literals += [(part, has_system and i == 0) for i, part in enumerate(parts[1:])]
            has_many_turns = has_many_turns or len(parts) > 4
    return list(dict.fromkeys(literals))


def _tool_marks(renderer: Renderer, added: Collection[str]) -> set[str]:
    """Return the tokens and the marks in brackets that the template writes around the result of a call."""
    call = {"type": "function", "function": {"name": "find", "arguments": {"q": "a"}}}
    tool: dict[str, Any] = {
        "type": "function",
        "function": {"name": "find", "description": "Find.", "parameters": _PARAMETERS},
    }
    turns: list[Message] = [_USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    chat = [*turns, {"role": "tool", "name": "find", "content": _CONTENT}, _ASSISTANT]
    try:
        fitted = fit_calls(renderer, chat, [tool])
        parts = renderer.render(fitted, [tool]).split(_CONTENT)
    except RowRefused:
        return set()
    if len(parts) != 4:
        return set()

    # What is around the call itself is a part of the assistant's turn.
    around = parts[1][-_RESULT_MARK_CHARACTERS:] + "\n" + parts[2]
    marks = {text for text in added if text in around} | set(_BRACKETED.findall(around))
    return {mark for mark in marks if "call" not in mark.lower() and not is_reasoning_tag(mark)}


def _plain_marks(part: str, is_whole: bool) -> dict[int, str]:
    """Return the plain text of a literal that marks turns, by its line in the literal."""
    marks = {}
    for number, line in enumerate(_BRACKETED.sub("\n", part).split("\n")):
        mark = line.strip()
        # The name of a role beside a token, as in ChatML's `user`, is a word; the token is the mark.
        if re.search(r"[^\w\s]", mark) and re.search(r"\w", mark):
            marks[number] = mark
        elif is_whole and mark.isalpha() and not _BRACKETED.search(part):
            marks[number] = f"{mark}\n"
    return marks


def _pattern(tokens: Collection[str], lines: Collection[str], inline: Collection[str]) -> re.Pattern[str] | None:
    parts = [re.escape(text) for text in sorted(tokens, key=len, reverse=True)]
    parts += [rf"(?<!\w){re.escape(mark)}" for mark in sorted(inline, key=len, reverse=True) if not mark.endswith("\n")]
    for mark in sorted(lines, key=len, reverse=True):
        end = r"[ \t]*$" if mark.endswith("\n") else ""
        parts.append(rf"^[ \t]*{re.escape(mark.strip())}{end}")
    return re.compile("|".join(parts), re.MULTILINE) if parts else None
