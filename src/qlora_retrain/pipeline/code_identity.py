"""Code identity: what of our code, and of the packages below it, can change a step's result.

The sha256 of the step's folder and of the library modules that it imports (found statically), with comments,
docstrings and formatting left out, and the pinned versions of the third-party packages that those files import. It is
read from files alone, so a checkout and an image compute the same value.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import UsageError

# The packages whose modules can change a result. All others carry a result, show it or refuse it.
HASHED_PACKAGES = ("lm", "evaluation")
# Packages that shape results without being imported by name.
IMPLIED = {
    "transformers": ("tokenizers", "safetensors", "accelerate"),
    "great_expectations": ("pandas",),
}


def project_root() -> Path:
    """The folder that holds `components/`: a checkout, or /app in an image.

    Raises:
        UsageError: If the package was installed apart from its components.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "components").is_dir():
        raise UsageError(f"{root}: no components/ folder here; run from a checkout (pip install -e .) or an image")
    return root


@cache
def identity(step: str, root: Path | None = None) -> str:
    """64 hex that change when the step's code, or a package that shapes its result, does.

    Raises:
        UsageError: If the step has no folder, or constraints.txt does not pin a package that it imports.
    """
    root = root or project_root()
    folder = root / "components" / step
    files = sorted(folder.glob("**/*.py"))
    if not files:
        raise UsageError(f"{folder}: no Python files; every step of the graph has its program there")
    hashes: dict[str, str] = {}
    third_party: set[str] = set()
    queue = [(f"components/{step}/{f.relative_to(folder)}", f) for f in files]
    while queue:
        name, path = queue.pop()
        if name in hashes:
            continue
        tree = ast.parse(path.read_bytes(), filename=str(path))
        for module in _imports(tree):
            top, _, rest = module.partition(".")
            if top == "qlora_retrain":
                found = _library_file(root, rest)
                if found is not None:
                    queue.append((str(found.relative_to(root)), found))
            elif top not in sys.stdlib_module_names and top != "components":
                third_party.add(top)
        hashes[name] = hashing.digest(ast.dump(_without_docstrings(tree)))
    return hashing.digest({"files": hashes, "packages": _pinned(root, third_party)})


def _imports(tree: ast.Module) -> Iterator[str]:
    """Every module named by an import, `from a import b` as both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _library_file(root: Path, dotted: str) -> Path | None:
    """The file of a module of the hashed packages; None for other modules and for names that are no module."""
    if dotted.partition(".")[0] not in HASHED_PACKAGES:
        return None
    base = root / "src" / "qlora_retrain" / Path(*dotted.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return tree


def _pinned(root: Path, modules: set[str]) -> dict[str, str]:
    pins = _pins(root / "constraints.txt")
    wanted = modules | {extra for m in modules for extra in IMPLIED.get(m, ())}
    missing = sorted(m for m in wanted if _project(m) not in pins)
    if missing:
        raise UsageError(f"constraints.txt: pins no version of {', '.join(missing)}; a result could not be repeated")
    return {m: pins[_project(m)] for m in sorted(wanted)}


def _project(module: str) -> str:
    return {"yaml": "pyyaml", "sklearn": "scikit-learn"}.get(module, module.replace("_", "-").lower())


@cache
def _pins(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise UsageError(f"{path}: not found; it pins the packages that shape results")
    pairs = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[._]+", "-", name).lower(): version for name, version in pairs}
