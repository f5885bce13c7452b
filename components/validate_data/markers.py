"""Markers in texts: the one after which an answer begins, and those that older formats left at the ends of rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from components.validate_data.values import RowFault, near_match

# What ended prompts and answers where a model had no chat template: runs of signs, tokens as text, words in capitals.
_END = re.compile(
    r"((?P<sign>[#%~@=*^+|$\-_&])(?P=sign)+>?|[-=]>|</?s>|<\|[^<>\s]{1,30}\|>|\[/?[A-Z_]{2,20}\]"
    r"|(?i:<(eos|bos|pad|end|stop|eot|end_of_turn|end_of_text)>)|(?<=\s)(END|STOP|EOS|EOF|DONE|FIN))\s*\Z"
)
_MAX_MARKER_CHARACTERS = 64
# How the answers of whole texts begin, the surest first.
_ANSWER_MARKERS = re.compile(
    r"(?im)(###? ?(?:response|assistant|answer|output|bot|gpt|completion|ai)\b:?|<\|(?:im_start\|>)?assistant(?:\|>)?"
    r"|\[(?:assistant|answer|response|bot)\]|\[/INST\]|<start_of_turn>model|<\|start_header_id\|>assistant<\|end_header_id\|>|(?-i:\bASSISTANT:)"
    r"|^(?:assistant|answer|response|output|bot|ai|a|gpt) ?:)"
)
_HEADING = re.compile(r"(?m)^(#{2,6} ?[^\W\d_][^\n:#]{0,30}:)")
# What the first line of a text opens with, where its turns are marked.
_OPENING = re.compile(r"\s*(###? ?[A-Za-z ]{1,20}:|<\|[^<>\s]{1,30}\|>|[A-Z][A-Za-z]{1,15}:)")


class EndMarkers:
    """Count the markers with which prompts and answers end."""

    def __init__(self) -> None:
        self._rows = 0
        self._counts = {"prompts": Counter[str](), "answers": Counter[str]()}

    def add(self, prompt: str, answer: str) -> None:
        """Count a row."""
        self._rows += 1
        for side, text in (("prompts", prompt), ("answers", answer)):
            if match := _END.search(text[-_MAX_MARKER_CHARACTERS:]):
                self._counts[side][match[1]] += 1

    def warnings(self) -> list[str]:
        """Return a sentence for each marker that ends more than half of the texts."""
        sentences = []
        for side, counts in self._counts.items():
            for marker, count in counts.most_common(1):
                if count * 2 > self._rows:
                    effect = (
                        "the model would learn to write it; remove it, since the chat template ends an answer itself"
                        if side == "answers"
                        else "every request would need it too; remove it, since the chat template ends a turn itself"
                    )
                    sentences.append(f'{count:,} of {self._rows:,} {side} end with "{marker}": {effect}')
        return sentences


def split_text(text: str, marker: str, *, is_label: bool = False) -> tuple[str, str]:
    """Return the prompt, up to and with the marker, and the answer: all that follows, to the letter.

    The marker counts where it last begins a line; where it begins none, it counts where it is last. A label has no
    white space around it, so the white space before one belongs to the prompt.

    Raises:
        RowFault: If the text has no such marker, or goes on with a further turn after the answer.
    """
    starts = [m.start() for m in re.finditer(re.escape(marker), text)]
    if not starts:
        raise RowFault("no_marker", _near_marker(text, marker))
    line_starts = [i for i in starts if not text[text.rfind("\n", 0, i) + 1 : i].strip()]
    end = (line_starts or starts)[-1] + len(marker)

    if is_label:
        end = len(text) - len(text[end:].lstrip())
    prompt, answer = text[:end], text[end:]
    opening = _OPENING.match(prompt)
    # Weaker openings, such as `Note:`, count at the start of a line alone.
    if opening and opening[1] != marker:
        pattern = re.escape(opening[1]) if opening[1][0] in "#<" else rf"(?m)^\s*{re.escape(opening[1])}"
        if re.search(pattern, answer):
            raise RowFault("text_goes_on", f'"{opening[1]}", with which the text begins')
    return prompt, answer


def suggest_marker(texts: Sequence[str]) -> str | None:
    """Return the marker after which the answers of most texts begin, or None."""
    counts = Counter(match[1] for text in texts if (match := _ANSWER_MARKERS.search(text)))
    for marker, _ in counts.most_common(1):
        if sum(marker in text for text in texts) * 5 >= len(texts) * 4:
            return marker

    # Headings in any language: of those that most texts have, the answer stands below the last.
    counts = Counter(heading for text in texts for heading in dict.fromkeys(_HEADING.findall(text)))
    shared = [heading for heading, count in counts.items() if count * 5 >= len(texts) * 4]
    return max(shared, key=texts[0].rfind) if len(shared) > 1 else None


def _near_marker(text: str, marker: str) -> str:
    """Return the part of a line that is most like the marker; it is as short as the marker, so it shows no row."""
    words = len(marker.split())
    heads = [" ".join(line.split()[:words])[: len(marker) + 8] for line in text.split("\n") if line.strip()]
    match = near_match(marker, heads)
    return f"did you mean {match!r}?" if match else ""
