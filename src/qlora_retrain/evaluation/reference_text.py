"""Reference text: general passages on which forgetting is measured.

Reads every `.jsonl` (`{"text": ...}` or `{"messages": [...]}` a line) and `.txt` (a paragraph a passage) of a folder;
other files, such as a licence without an ending, are left alone. Refuses (12) a folder without a passage.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat

Passage = str | list[chat.Message]


def read(folder: Path) -> list[Passage]:
    """Every passage, by file and position: text, or a chat of which the assistant's turns will be judged.

    Raises:
        UsageError: If a line is neither form, or there is no passage at all.
    """
    passages: list[Passage] = []
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
    unique = {passage_id(p): p for p in passages if p and (not isinstance(p, str) or p.strip())}
    if not unique:
        raise UsageError('reference_data: no passage found; wanted .jsonl with {"text": ...} or .txt files')
    return list(unique.values())


def passage_id(passage: Passage) -> str:
    """16 hex of its content."""
    text = passage if isinstance(passage, str) else json.dumps(passage, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _paragraphs(text: str) -> list[str]:
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


def _passage(line: str, where: str) -> Passage:
    wrong = UsageError(f'reference_data: {where}: wanted {{"text": ...}} or {{"messages": [...]}}')
    try:
        row = json.loads(line)
        if "text" not in row:
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
            if not any(turn["role"] == "assistant" for turn in turns):
                raise UsageError(f"reference_data: {where}: a chat without an assistant turn; nothing to judge")
            return turns
    except (ValueError, KeyError, TypeError) as error:
        raise wrong from error
    if not isinstance(row["text"], str):
        raise UsageError(f'reference_data: {where}: "text" is {type(row["text"]).__name__}; wanted a string')
    return row["text"]
