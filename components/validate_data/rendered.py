"""Read back texts into which chats were written: ChatML, Llama 2 and 3, Gemma, Zephyr, Phi-3, and speakers' names.

A text counts only if it is such turns from its beginning to its end; one that merely mentions a mark stays a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_BEGIN = r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>)?\s*"
_END = r"\s*(?:</s>|<eos>|<\|end_of_text\|>|<\|endoftext\|>)?\s*"


@dataclass(frozen=True, slots=True)
class Style:
    """How a family writes a turn: its head, which has the role, and its end.

    Attributes:
        name: The name, for the log.
        head: A pattern whose first group is the role.
        end: A pattern; the last turn of a text may lack it.
    """

    name: str
    head: str
    end: str

    def read(self, text: str) -> list[dict[str, str]] | None:
        """Return the turns; None where the text is not such turns alone."""
        match = re.compile(_BEGIN).match(text)
        position, turns = match.end() if match else 0, []
        head, stop = re.compile(self.head), re.compile(rf"{self.end}|{self.head}")
        while opening := head.match(text, position):
            closing = stop.search(text, opening.end())
            # A turn that does not end before the next begins is no turn of this style.
            if closing and head.match(text, closing.start()):
                return None
            end = closing.start() if closing else len(text)
            content = text[opening.end() : end]
            turns.append({"role": opening[1], "content": content if closing else content.rstrip("\n")})
            position = closing.end() if closing else end
            position += len(text[position:]) - len(text[position:].lstrip("\n"))
        is_whole = re.compile(_END).fullmatch(text, position) is not None
        return turns if turns and is_whole else None


@dataclass(frozen=True, slots=True)
class Llama2:
    """Exchanges between `[INST]` and `</s>`; the first may have a system turn within."""

    name: str = "Llama 2"

    def read(self, text: str) -> list[dict[str, str]] | None:
        """Return the turns; None where the text is not such exchanges alone."""
        exchange = re.compile(
            r"\s*(?:<s>)?\s*\[INST\] ?(?:<<SYS>>\n(?P<system>.*?)\n<</SYS>>\n\n)?"
            r"(?P<user>(?:(?!\[INST\]).)*?) ?\[/INST\] ?"
            r"(?P<assistant>(?:(?!\[/?INST\]|</s>).)*?)\s*(?:</s>|(?=\[INST\])|\Z)",
            re.DOTALL,
        )
        position, turns = 0, []
        while position < len(text.rstrip()) and (match := exchange.match(text, position)):
            roles = [(role, match[role]) for role in ("system", "user", "assistant")]
            turns += [{"role": role, "content": content} for role, content in roles if content is not None]
            position = match.end()
        return turns if turns and not text[position:].strip() else None


@dataclass(frozen=True, slots=True)
class SpeakerLines:
    """Paragraphs that begin with `Human:` and `Assistant:` in turn, as in Anthropic's preference data."""

    name: str = "paragraphs of Human and Assistant"

    def read(self, text: str) -> list[dict[str, str]] | None:
        """Return the turns; None where the text is not such paragraphs, one speaker after the other."""
        before, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?", text)
        speakers, contents = parts[::2], parts[1::2]
        in_turn = all(speaker == ("Human", "Assistant")[i % 2] for i, speaker in enumerate(speakers))
        if before.strip() or not parts or not in_turn:
            return None
        return [{"role": role, "content": content} for role, content in zip(speakers, contents, strict=True)]


AnyStyle = Style | Llama2 | SpeakerLines
STYLES: tuple[AnyStyle, ...] = (
    Style("ChatML", r"<\|im_start\|>(\w+)\n", r"<\|im_end\|>"),
    Style("Llama 3", r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n", r"<\|(?:eot_id|eom_id)\|>"),
    Style("Gemma", r"<start_of_turn>(\w+)\n", r"<end_of_turn>"),
    Style("Zephyr or Phi-3", r"<\|(system|user|assistant)\|>\n?", r"(?:</s>|<\|end\|>|<\|endoftext\|>)"),
    Llama2(),
    SpeakerLines(),
)


def style_of(values: Sequence[object]) -> AnyStyle | None:
    """Return the style in which all of the texts are written, each with an answer; None where there is none."""
    for style in STYLES:
        chats = [style.read(value) or [] if isinstance(value, str) else [] for value in values]
        ends = [chat[-1] for chat in chats if chat and chat[-1]["role"] in ("assistant", "model", "Assistant")]
        if ends and len(ends) == len(values) and any(end["content"].strip() for end in ends):
            return style
    return None
