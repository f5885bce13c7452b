"""The shape of the code: what `core` may import, who may name a step, how long a file may be."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from qlora_retrain.core import graph

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "src" / "qlora_retrain").rglob("*.py"))
PRODUCT = [*LIBRARY, *sorted((ROOT / "components").rglob("*.py"))]
MAX_LINES = 300


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.parent.name == "core"], ids=relative)
def test_core_imports_the_standard_library_and_itself_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            is_own = module.startswith("qlora_retrain.core") or module == "qlora_retrain"  # the latter has the version
            assert is_own or module.partition(".")[0] in sys.stdlib_module_names, module


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.name != "graph.py"], ids=relative)
def test_the_library_names_no_step_but_in_the_graph(path: Path) -> None:
    """Names that are also sections of a line's YAML (`evaluate`, `publish`) may be attributes and keywords."""
    names = {step.name for step in graph.STEPS}
    strings = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    assert not [f"line {n.lineno}: {n.value}" for n in strings if n.value in names]


RUNTIMES = [p for p in LIBRARY if {"runtimes", "demo"} & set(p.parts) and p.name != "foreign_messages.py"]
MATCHING = set(
    "startswith endswith find index count search match fullmatch findall compile split rsplit partition rpartition "
    "removeprefix removesuffix".split()
)


def matched_sentences(tree: ast.Module) -> list[str]:
    """Every text with a space in it that code compares with, or looks for in, another text."""
    operands: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands += [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MATCHING:
            operands += node.args
    texts = [n.value for operand in operands for n in ast.walk(operand) if isinstance(n, ast.Constant)]
    return [text for text in texts if isinstance(text, str) and " " in text.strip()]


@pytest.mark.parametrize("path", RUNTIMES, ids=relative)
def test_no_runtime_matches_a_sentence(path: Path) -> None:
    """How a step ended is data. Only `foreign_messages` matches texts, and only those of other programs."""
    assert matched_sentences(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "source", ['"out of memory" in text', 're.search(r"try again (75)", text)', 'f"{step}: internal error" in text']
)
def test_a_matched_sentence_is_noticed(source: str) -> None:
    assert matched_sentences(ast.parse(source))


def test_no_code_cuts_text_into_lines_with_splitlines() -> None:
    """It also cuts at U+2028, U+0085 and other characters that rows may hold; `core.json_lines` cuts at line ends."""
    calls = [
        f"{relative(path)}:{node.lineno}"
        for path in PRODUCT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "splitlines"
    ]
    assert not calls


def test_no_file_of_the_product_is_longer_than_a_person_reads_at_once() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in PRODUCT}
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}
