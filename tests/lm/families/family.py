"""What a family of chat models is, as far as its chats are rendered, tokenized and stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Reasons = frozenset[str]

# Reasons for which a row may be refused, as `RowRefused.reason` writes them.
DROPS, REWRITES, RAISES = "template_drops_text", "template_rewrites_text", "template_refuses"
NO_STOP, INSIDE, MARK = "answer_end_is_no_stop", "answer_inside_reasoning", "mark_in_text"
TOOLS = "tools_unsupported"


@dataclass(frozen=True)
class Family:
    """One chat template with its tokenizer, by facts that were written down by hand.

    Attributes:
        name: As in the table of families.
        tokenizer: `byte` (byte-level BPE, the cut of Llama 3), `gpt2` (with GPT-2's cut), `llama` or `gemma`
            (SentencePiece's pieces, with or without a word mark before every text), `metaspace` (the mark before the
            whole text alone) or `spaced` (GPT-2's cut, with a space before every text).
        template: The Jinja text, or several by name.
        eos: The end-of-sequence token.
        headers: An answer begins right after one of these texts.
        ends: An answer ends with one of these texts; none where the template writes no end.
        next_turns: Where the template writes no end, the texts with which the turn after an answer begins.
        stops: The tokens at which the family's servers stop.
        bos: The beginning-of-sequence token.
        special: Further special tokens.
        plain: Added tokens that are not special.
        role_mark: The assistant's mark, as a text that tries to forge a turn writes it.
        tool_mark: A text with which a tool's turn begins, where the family has tools.
        configured: The stops that `generation_config.json` lists; None: all of them.
        takes_parts: Whether the template reads contents as lists of parts alone.
        marks_strip: Whether special tokens swallow white space: "", "right" or "both", as Phi-4's do.
        kwargs: Variables of the template for `data.template_kwargs`, with which no reasoning is opened.
        expected: By the kind of row, the reasons for which it cannot be rendered right.
    """

    name: str
    tokenizer: str
    template: str | dict[str, str]
    eos: str
    headers: tuple[str, ...]
    stops: tuple[str, ...]
    role_mark: str
    ends: tuple[str, ...] = ()
    next_turns: tuple[str, ...] = ()
    bos: str | None = None
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    tool_mark: str = ""
    configured: tuple[str, ...] | None = None
    takes_parts: bool = False
    marks_strip: str = ""
    kwargs: Mapping[str, object] = field(default_factory=dict)
    expected: Mapping[int, Reasons] = field(default_factory=dict)


def refused(*kinds: int, by: str | tuple[str, ...]) -> dict[int, Reasons]:
    """Return that rows of these kinds are refused, for one of the reasons."""
    reasons = frozenset([by] if isinstance(by, str) else by)
    return dict.fromkeys(kinds, reasons)


def tokens(text: str) -> tuple[str, ...]:
    """Split a list of tokens at white space."""
    return tuple(text.split())


# What many templates cannot do.
NO_TOOLS = refused(6, 11, by=(TOOLS, DROPS, RAISES))
NO_REASONING_FIELD = refused(13, by=DROPS)
ALTERNATES = refused(7, 8, by=RAISES)
# The facts of many families with a tokenizer of Llama's kind.
SP: dict[str, Any] = {
    "tokenizer": "llama",
    "bos": "<s>",
    "eos": "</s>",
    "ends": ("</s>",),
    "stops": ("</s>",),
}
