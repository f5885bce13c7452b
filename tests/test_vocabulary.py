"""Identifiers are the field's words: no bare past participle and no pronoun-like word names anything we define."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REFUSED = frozenset(
    "found made told given wanted said held kept known how what of more rest some one other asked seen shown drawn "
    "gone taken sent chosen meant noted thinned spread upstream tick polite patient".split()
)
FOLDERS = sorted(
    {
        p.parent
        for top in ("src", "components", "dags", "pipelines", "benchmarks", "images", "tests")
        for p in (ROOT / top).rglob("*.py")
    }
)


def defined(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that the file gives to something, with its line; names that it imports are others' choice."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_identifier_is_a_refused_word(folder: Path) -> None:
    refused = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted(folder.glob("*.py"))
        for line, name in defined(ast.parse(path.read_text()))
        if name.strip("_").lower() in REFUSED
    ]
    assert not refused, "\n".join(refused)
