"""Read reference text: general passages on which forgetting is measured.

Reads every `.jsonl` (one `{"text": ...}` or `{"messages": [...]}` per line) and `.txt` (one passage per paragraph) of a
folder. Other files, such as a licence without a suffix, are ignored. Refuses (12) a folder without a passage.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qlora_retrain.core import json_depth, json_lines
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat, conversations

Passage = str | list[chat.Message]


def read_passages(folder: Path) -> list[Passage]:
    """Read every passage, by file and position: a text, or a chat whose assistant turns will be scored.

    Raises:
        UsageError: If a line has neither form, or there is no passage at all.
    """
    passages: list[Passage] = []
    # Sorted, because the order of files in a folder differs from machine to machine.
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".jsonl", ".txt"):
            continue
        try:
            if path.suffix == ".txt":
                passages += _split_paragraphs(path.read_text(encoding="utf-8-sig"))
            else:
                lines = json_lines.read_lines(path)
                passages += [_parse_passage(line, f"{path.name}:{number}") for number, line in lines]
        except UnicodeDecodeError as error:
            raise UsageError(f"reference_data: {path.name}: the file is not UTF-8 text, convert it: {error}") from error

    # A repeated passage would count twice, and so narrow the interval without new evidence.
    unique = {passage_id(p): p for p in passages if p and (not isinstance(p, str) or p.strip())}
    if not unique:
        raise UsageError(
            'reference_data: no passage found; the folder must hold .jsonl files with {"text": ...} or .txt files'
        )
    return list(unique.values())


def passage_id(passage: Passage) -> str:
    """Return 16 hex digits of the hash of its content."""
    # Sorted keys, so that a chat has one id however its file was written.
    text = passage if isinstance(passage, str) else json.dumps(passage, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_id(passage: Passage) -> str:
    """Return the id of a chat's prompt, which several chats may have; empty for a text, which has no prompt."""
    return "" if isinstance(passage, str) else conversations.prompt_id(passage)


def _split_paragraphs(text: str) -> list[str]:
    """Split a text at its empty lines."""
    paragraphs: list[list[str]] = [[]]
    for line in json_lines.split_lines(text):
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return ["\n".join(lines) for lines in paragraphs if lines]


def _parse_passage(line: str, location: str) -> Passage:
    wrong_form = UsageError(f'reference_data: {location}: a line must be {{"text": ...}} or {{"messages": [...]}}')
    try:
        row = json_depth.loads(line)
        if "text" not in row:
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
            # Only the assistant's tokens are scored, so a chat without them would measure nothing.
            if not any(turn["role"] == "assistant" for turn in turns):
                raise UsageError(f"reference_data: {location}: a chat needs an assistant turn to be scored")
            return turns
    except (ValueError, KeyError, TypeError) as error:
        raise wrong_form from error
    if not isinstance(row["text"], str):
        raise UsageError(f'reference_data: {location}: "text" is {type(row["text"]).__name__}; it must be a string')
    return row["text"]
