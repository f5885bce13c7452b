"""Read YAML that anybody may have written: bounded in size, depth and numbers, without anchors, and of JSON's types.

An anchor lets a few hundred bytes stand for more values than memory holds, and deep nesting exhausts the stack. Both
are refused while the text is read, before anything is built from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qlora_retrain.core import local_files
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.source_access import SourceAccess

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_INTEGER = 2**53 - 1
# A document on a command line holds the text of its chat template, which is a file of its own otherwise.
MAX_TEXT_BYTES = 16 * MAX_BYTES


def read_text(path: Path) -> str:
    """Return the text of a YAML file.

    Raises:
        UsageError: If it is no regular file, cannot be read as UTF-8 text, or is too large.
    """
    return local_files.read_text(path, SourceAccess(), MAX_BYTES)


def parse(text: str, place: str) -> tuple[Any, yaml.Node | None]:
    """Return the value of a YAML text, and its nodes, which know their lines.

    Args:
        text: The YAML.
        place: Where it comes from; messages begin with it.

    Raises:
        UsageError: If it is not valid YAML, has an anchor, an alias or a value that JSON lacks, or is too large or too
            deep.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise UsageError(f"{place}: expected at most {MAX_TEXT_BYTES // 1024} KiB of YAML, found more")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(node), node
    except _Unbounded as error:
        raise UsageError(f"{place}:{error}") from error
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


class _Unbounded(Exception):
    """What a text has too much of, after its line."""


class _Loader(yaml.SafeLoader):
    """PyYAML's loader without what YAML has and JSON has not, except dates."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Build the next node, unless it is an anchor, an alias, or too deep."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _Unbounded(f"{line}: anchors and aliases (& and *) are not allowed; write the value out")
        self._depth += 1
        if self._depth > MAX_DEPTH and isinstance(event, yaml.CollectionStartEvent):
            raise _Unbounded(f"{line}: expected at most {MAX_DEPTH} levels of nesting, found more")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number that every reader of JSON takes; a longer one stops Airflow from reading any line."""
        value: int = super().construct_yaml_int(node)
        if abs(value) > MAX_INTEGER:
            raise yaml.constructor.ConstructorError(None, None, "a number of too many digits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _name in ("binary", "omap", "pairs", "set"):
    # Also one that is written out, such as !!set.
    del _Loader.yaml_constructors[f"tag:yaml.org,2002:{_name}"]
