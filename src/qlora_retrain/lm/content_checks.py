"""Check that a rendered chat says what its turns say: every text, in its order, to the letter."""

from __future__ import annotations

from qlora_retrain.lm.rendering import Rendering, RowRefused, describe_turn


def check_contents(rendering: Rendering) -> tuple[str, ...]:
    """Return what was trimmed; refuse a rendering that lacks a content.

    Earlier assistant turns may be shortened: they were whole in the example in which they were the answer.

    Raises:
        RowRefused: If a turn is dropped, rewritten or moved.
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
    _refuse_moved_turn(rendering)
    return ("trimmed_ends",) if is_trimmed else ()


def _content_fault(rendering: Rendering, turn: int, name: str, text: str) -> RowRefused:
    description = describe_turn(rendering.chat, turn) + (", its reasoning" if name == "reasoning_content" else "")
    # The same letters in another case, or with other white space, are a rewriting.
    collapsed = "".join(text.split()).casefold()
    # An earlier turn may say the same; a system turn may stand anywhere.
    ends = [span.end for (number, _), span in rendering.spans.items() if number < turn]
    behind = rendering.text[max(ends, default=0) :] if rendering.chat[turn]["role"] != "system" else rendering.text
    if collapsed in "".join(behind.split()).casefold():
        return RowRefused("template_rewrites_text", f"the chat template rewrites the text of {description}")
    return RowRefused("template_drops_text", f"the chat template leaves out text of {description}")


def _refuse_moved_turn(rendering: Rendering) -> None:
    """Refuse turns in another order than the row's; system turns may stand anywhere."""
    regions: dict[int, tuple[int, int]] = {}
    for (turn, _), span in rendering.spans.items():
        start, end = regions.get(turn, (span.start, span.end))
        regions[turn] = (min(start, span.start), max(end, span.end))

    previous_end = 0
    for turn, (start, end) in sorted(regions.items()):
        if rendering.chat[turn]["role"] == "system":
            continue
        if start < previous_end:
            raise RowRefused(
                "template_rewrites_text",
                f"the chat template writes {describe_turn(rendering.chat, turn)} in front of a turn before it",
            )
        previous_end = end
