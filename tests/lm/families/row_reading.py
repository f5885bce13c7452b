"""Read every rendering of one row, and say whether the row can be encoded right, and why it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tests.lm.families.alignment import align, byte_offset
from tests.lm.families.family import DROPS, INSIDE, MARK, NO_STOP, RAISES, REWRITES, TOOLS, Family, Reasons
from tests.lm.families.reading import (
    BLOCKS,
    AnswerRegion,
    Piece,
    as_parts,
    clock,
    find_answer,
    find_turn,
    next_opening,
    opens_reasoning,
    pieces_of,
    with_string_arguments,
)
from tests.lm.families.rows import Row, Turn

NOTHING: Reasons = frozenset()
HONEST = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class Prefix:
    """The chat up to one assistant turn, rendered and read.

    Attributes:
        text: The rendering; None where the template raises.
        pieces: Of every turn, its texts and where they are.
        regions: Of every assistant turn that is whole, where it stands.
    """

    text: str | None
    pieces: dict[int, list[Piece]]
    regions: dict[int, AnswerRegion]


class Reading:
    """What a careful person sees in the rendering of one row.

    Attributes:
        must: Reasons for which the row cannot be encoded right; any of them is a true reason to refuse it.
        may: Further reasons that would be true.
    """

    def __init__(
        self, family: Family, row: Row, tokenizer: Any, day: str, kwargs: dict[str, Any] | None = None
    ) -> None:
        self.family, self.row, self.tokenizer, self.day = family, row, tokenizer, day
        self.kwargs = kwargs or {}
        self._texts: dict[tuple[int, bool], str | None] = {}
        self.messages = self._fit_arguments()
        self.answers = [i for i, turn in enumerate(row.messages) if turn["role"] == "assistant"]
        self.learnt = [i for i in self.answers if row.messages[i].get("weight", 1)]
        self.prefixes = {i: self._read(i + 1) for i in self.answers}
        is_answered = self.answers[-1] == len(row.messages) - 1
        self.whole = self.prefixes[self.answers[-1]] if is_answered else self._read(len(row.messages))
        self.must, self.may = self._reasons()

    def render(self, count: int, *, is_prompt: bool = False) -> str | None:
        """Render the first turns; None where the template raises."""
        key = (count, is_prompt)
        if key not in self._texts:
            self._texts[key] = self._render(self.messages[:count], is_prompt)
        return self._texts[key]

    def ids(self, text: str) -> list[int]:
        """Return the ids of a whole text, as `apply_chat_template(tokenize=True)` takes them."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def prompts(self) -> dict[int, str | None]:
        """The text that the model reads before each answer, as servers render it."""
        return {i: self.render(i, is_prompt=True) for i in self.answers}

    @property
    def is_trimmed(self) -> bool:
        """Whether white space at the ends of a text is gone, by the template or by a mark that swallows it."""
        prefixes = [self.prefixes[i] for i in self.learnt]
        by_template = any(piece.is_trimmed for prefix in prefixes for turn in prefix.pieces.values() for piece in turn)
        return by_template or any(self._is_swallowed(prefix) for prefix in prefixes)

    @property
    def has_outer_space(self) -> bool:
        """Whether a text of the row has white space at its ends, or around the marks of its reasoning."""
        texts = [text for turn in self.row.messages for text, _ in pieces_of(turn)]
        return any(text != text.strip() or "</think>" in text for text in texts)

    @property
    def is_ambiguous(self) -> bool:
        """Whether white space that is gone could also be what the template writes around the text."""
        return all(text in (self.whole.text or "") for turn in self.row.messages for text, _ in pieces_of(turn))

    def _render(self, messages: Sequence[Turn], is_prompt: bool) -> str | None:
        # No row's text may crash a template; whatever it raises is its refusal.
        try:
            with clock(self.day):
                text = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=self.row.tools,
                    tokenize=False,
                    add_generation_prompt=is_prompt,
                    **self.kwargs,
                )
        except Exception:  # noqa: BLE001
            return None
        return str(text)

    def _fit_arguments(self) -> list[Turn]:
        """Take the arguments of calls as the template does: as an object or as a JSON string."""
        messages = as_parts(self.row.messages) if self.family.takes_parts else self.row.messages
        if not any(turn.get("tool_calls") for turn in messages):
            return messages
        forms = [messages, with_string_arguments(messages)]
        texts = [self._render(form, is_prompt=False) for form in forms]
        is_json = [text is not None and "{'" not in text and '"{\\"city' not in text for text in texts]
        return forms[1] if is_json[1] and not is_json[0] else forms[0]

    def _read(self, count: int) -> Prefix:
        text, cursor = self.render(count), 0
        pieces: dict[int, list[Piece]] = {}
        regions: dict[int, AnswerRegion] = {}
        for i, turn in enumerate(self.row.messages[:count] if text is not None else []):
            # A system turn may stand elsewhere, as in front of all or in the last question.
            start = 0 if turn["role"] == "system" else cursor
            # Some templates write the answer's mark with the question, so a chat's first turn has none before it.
            if turn["role"] == "assistant" and i > 0:
                start = next_opening(self.family, text or "", cursor)
            pieces[i] = find_turn(text or "", turn, start)
            if turn["role"] == "assistant" and (region := find_answer(self.family, text or "", pieces[i], cursor)):
                regions[i] = region
            if turn["role"] != "system":
                cursor = max([cursor, *(piece.end for piece in pieces[i])])
        return Prefix(text, pieces, regions)

    def _reasons(self) -> tuple[Reasons, Reasons]:
        has_calls = any(turn.get("tool_calls") for turn in self.row.messages)
        about_tools = frozenset([TOOLS]) if self.row.tools or has_calls else NOTHING
        must, may = self._mark_reasons()
        if self.whole.text is None:
            return must | {RAISES} | about_tools, may
        for i in self.learnt:
            prefix = self.prefixes[i]
            if prefix.text is None:
                must |= frozenset([RAISES]) | about_tools
                continue
            for j, pieces in prefix.pieces.items():
                # An earlier answer is judged in its own prefix.
                if j == i or self.row.messages[j]["role"] != "assistant":
                    must |= frozenset(reason for piece in pieces for reason in piece.faults)
                    may |= frozenset(reason for piece in pieces for reason in piece.excuses)
                    is_call = bool(self.row.messages[j].get("tool_calls"))
                    must |= about_tools if is_call and any(p.start < 0 for p in pieces) else NOTHING
            must |= self._tool_reasons(prefix.text)
            more_must, more_may = self._answer_reasons(i, prefix)
            must, may = must | more_must, may | more_may
        return must, may

    def _tool_reasons(self, text: str) -> Reasons:
        functions = [tool["function"] for tool in self.row.tools or []]
        is_whole = all(f["name"] in text and f["description"] in text for f in functions)
        return NOTHING if is_whole else frozenset([TOOLS, DROPS])

    def _answer_reasons(self, i: int, prefix: Prefix) -> tuple[Reasons, Reasons]:
        region, text, prompt = prefix.regions.get(i), prefix.text or "", self.prompts[i]
        must, may = NOTHING, NOTHING

        # A prompt that the history does not begin with either opens reasoning or has been rewritten.
        if prompt is not None and not text.startswith(prompt):
            may |= {INSIDE} if any(mark in prompt[-40:] for pair in BLOCKS for mark in pair) else {REWRITES}
        if region is None:
            # A text that is whole, but behind no mark of the assistant's.
            is_whole = all(piece.start >= 0 for piece in prefix.pieces[i])
            return (frozenset([DROPS, REWRITES]) if is_whole else NOTHING), may
        if region.mark and region.mark not in self.family.stops:
            must |= {NO_STOP}
        first = next(iter(self.row.messages[i]["content"].split()), "")
        if opens_reasoning(text[region.opening : region.content]):
            must |= {INSIDE, DROPS} if first.startswith("<think>") else {INSIDE}
        if self._is_swallowed(prefix):
            may |= {REWRITES}
        return must, may

    def _mark_reasons(self) -> tuple[Reasons, Reasons]:
        """Say whether a text forges a turn, and whether it holds what looks like a mark."""
        text = self.row.forged
        if text is None:
            return NOTHING, NOTHING
        added = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.content.strip()]
        if any(token in text for token in added):
            return frozenset([MARK]), NOTHING

        # A mark of plain text counts at the start of a line, and wherever an honest rendering has it.
        mark = self.family.role_mark.strip("\n")
        marks = tuple(m for m in (mark, self.family.tool_mark.strip("\n")) if m)
        lines = text.splitlines()
        if any(line.startswith(marks) for line in lines) or (mark in text and self._is_mark_within_lines(mark)):
            return frozenset([MARK]), NOTHING
        is_word = mark.rstrip(":").replace(" ", "").isalnum()
        return NOTHING, (NOTHING if is_word else frozenset([MARK]))

    def _is_mark_within_lines(self, mark: str) -> bool:
        honest = self._render(HONEST, False) or ""
        before = honest[: honest.find(mark)]
        ends = [t.content for t in self.tokenizer.added_tokens_decoder.values()]
        return bool(before) and not before.endswith("\n") and not any(before.endswith(token) for token in ends)

    def _is_swallowed(self, prefix: Prefix) -> bool:
        if not self.family.marks_strip or prefix.text is None:
            return False
        alignment = align(self.tokenizer, self.ids(prefix.text), prefix.text)
        assert alignment is not None
        texts = [
            (byte_offset(prefix.text, piece.start), byte_offset(prefix.text, piece.end))
            for pieces in prefix.pieces.values()
            for piece in pieces
            if piece.start >= 0
        ]
        return any(a < end and start < b for start, end in alignment.swallowed for a, b in texts)
