"""Write a model card's parts so that no text of a line can break them: paragraphs, cells, code blocks.

What a line says is text and not Markdown: a description with `---`, a rule named after a label with `|`, or `<script>`
is shown as it is written.
"""

from __future__ import annotations

import re

from qlora_retrain.config.publish import PublishConfig

# An underscore within a word is no mark.
_MARKS = re.compile(r"([\\`*\[\]{}<>|~#&$]|(?<![^\W_])_|_(?![^\W_]))")
# At the beginning of a paragraph these make it a list, a quotation or a heading.
_FIRST_MARKS = re.compile(r"^([-+=:]|\d+(?=[.)]))")
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def paragraph(text: str) -> str:
    """Return a text as one paragraph."""
    return _FIRST_MARKS.sub(lambda mark: f"{mark[1]}\\" if mark[1].isdigit() else f"\\{mark[1]}", inline(text))


def row(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(inline(cell) or ' ' for cell in cells)} |"


def inline(text: str) -> str:
    """Return a text on one line, with nothing in it that Markdown or HTML would read as a mark."""
    return _MARKS.sub(r"\\\1", " ".join(_INVISIBLE.sub(" ", text).split()))


def code_block(text: str, language: str = "text") -> str:
    """Return a text to the letter, in a block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{_INVISIBLE.sub(' ', text)}\n{fence}"


def licence_text(config: PublishConfig) -> str:
    """Return the licence as a person reads it."""
    name = f"{config.licence_name} (other)" if config.licence == "other" else config.licence
    return f"{name}, {config.licence_link}" if config.licence_link else name
