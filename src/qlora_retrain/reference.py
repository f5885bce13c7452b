"""Reference text: general passages on which forgetting is measured.

Reads every `.jsonl` (`{"text": ...}` or `{"messages": [...]}` a line) and `.txt` (a paragraph a passage) of a folder;
other files, such as a licence without an ending, are left alone. Refuses (12) a folder without a passage.
"""

from __future__ import annotations

import json
from pathlib import Path

from qlora_retrain.errors import UsageError


def read(folder: Path) -> list[str]:
    """Every passage, by file and position; a chat becomes its turns' contents, one a paragraph.

    Raises:
        UsageError: If a line is neither form, or there is no passage at all.
    """
    passages: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".jsonl", ".txt"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"reference_data: {path.name}: wanted UTF-8 text: {error}") from error
        if path.suffix == ".txt":
            passages += _paragraphs(text)
        else:
            lines = enumerate(text.splitlines(), 1)
            passages += [_passage(line, f"{path.name}:{number}") for number, line in lines if line.strip()]
    # A passage twice would count twice and narrow the interval for nothing.
    unique = list(dict.fromkeys(p for p in passages if p.strip()))
    if not unique:
        raise UsageError('reference_data: no passage found; wanted .jsonl with {"text": ...} or .txt files')
    return unique


def _paragraphs(text: str) -> list[str]:
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


def _passage(line: str, where: str) -> str:
    try:
        row = json.loads(line)
        passage = row["text"] if "text" in row else "\n\n".join(turn["content"] for turn in row["messages"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'reference_data: {where}: wanted {{"text": ...}} or {{"messages": [...]}}') from error
    if not isinstance(passage, str):
        raise UsageError(f'reference_data: {where}: "text" is {type(passage).__name__}; wanted a string')
    return passage
