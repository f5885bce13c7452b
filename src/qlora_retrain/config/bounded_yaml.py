"""Read YAML that anybody may have written: bounded in size and depth, and without anchors.

An anchor lets a few hundred bytes stand for more values than memory holds, and deep nesting exhausts the stack. Both
are refused while the text is a stream of events, before anything is built from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qlora_retrain.core.errors import UsageError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
# A document on a command line holds the text of its chat template, which is a file of its own otherwise.
MAX_TEXT_BYTES = 16 * MAX_BYTES


def read_text(path: Path) -> str:
    """Return the text of a YAML file.

    Raises:
        UsageError: If it cannot be read as UTF-8 text, or is too large.
    """
    try:
        # A pipe or a device would have no end.
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: expected a YAML file, found a folder, a pipe or a device")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(f"{path}: expected at most {MAX_BYTES // 1024} KiB of YAML, found more")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def parse(text: str, place: str) -> tuple[Any, yaml.Node | None]:
    """Return the value of a YAML text, and its nodes, which know their lines.

    Args:
        text: The YAML.
        place: Where it comes from; messages begin with it.

    Raises:
        UsageError: If it is not valid YAML, has an anchor or an alias, or is too large or too deep.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise UsageError(f"{place}: expected at most {MAX_TEXT_BYTES // 1024} KiB of YAML, found more")
    try:
        _refuse_unbounded(text, place)
        return yaml.safe_load(text), yaml.compose(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{place}: not valid YAML: {fault(error)}") from error
    # What looks like a date or a number and is none, such as 2026-13-45.
    except ValueError as error:
        raise UsageError(
            f"{place}: not valid YAML: a value looks like a date or a number and is none: {error}"
        ) from error


def fault(error: yaml.YAMLError) -> str:
    """Return the fault and its place, without the text of the line, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{getattr(error, 'problem', None) or type(error).__name__}"


def _refuse_unbounded(text: str, place: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UsageError(f"{place}:{line}: anchors and aliases (& and *) are not allowed; write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise UsageError(f"{place}:{line}: expected at most {MAX_DEPTH} levels of nesting, found more")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
