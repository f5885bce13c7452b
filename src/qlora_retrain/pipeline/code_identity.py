"""Code identity: a hash of all code that can change a step's result, ours and that of packages.

The hash covers the step's folder and the modules of `lm/` and `evaluation/` that it imports, which are found
statically. It covers the constants of other library modules that those files use, and the pinned versions of the
third-party packages that they import. Comments, docstrings and formatting are left out. It is read from files alone, so
a checkout and an image compute the same value.

Functions and classes of other library modules are not hashed: they carry a result, show it or refuse it. A test lists
each of them that a step uses, with the reason why it cannot change an artifact.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import re
import sys
from collections.abc import Iterator
from functools import cache, lru_cache
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
    """Return the folder that holds `components/`: a checkout, or /app in an image.

    Raises:
        UsageError: If the package was installed apart from its components.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "components").is_dir():
        raise UsageError(f"{root}: no components/ folder here; run from a checkout (pip install -e .) or an image")
    return root


@cache
def code_hash(step: str, root: Path | None = None) -> str:
    """Return 64 hex digits that change with the step's code and with the packages that shape its result.

    Raises:
        UsageError: If the step has no folder, or constraints.txt does not pin a package that it imports.
    """
    root = root or project_root()
    file_hashes: dict[str, str] = {}
    constant_values: dict[str, str] = {}
    third_party: set[str] = set()
    with _no_collections():
        for name, tree in hashed_files(step, root):
            constant_values |= constants(root, tree)
            third_party |= {
                top
                for module in _imports(tree)
                if (top := module.partition(".")[0]) not in {*sys.stdlib_module_names, "qlora_retrain", "components"}
            }
            file_hashes[name] = _digest(tree)

    packages = _pinned(root, third_party)
    return hashing.sha256_json({"files": file_hashes, "constants": constant_values, "packages": packages})


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Leave the garbage collector out: half a million nodes without a cycle would make it look at all of them often.

    In a process that has imported Airflow, that is a third of the time of all hashes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def hashed_files(step: str, root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield each file that enters the step's hash: its path below `root`, and its syntax tree.

    Raises:
        UsageError: If the step has no folder.
    """
    folder = root / "components" / step
    queue = sorted(folder.glob("**/*.py"))
    if not queue:
        raise UsageError(f"{folder}: no Python files; every step of the graph has its program there")

    # Library modules import each other, so each is visited once.
    visited: set[Path] = set()
    while queue:
        path = queue.pop()
        if path in visited:
            continue
        visited.add(path)

        tree = _parse(path.read_bytes())
        modules = [m.removeprefix("qlora_retrain.") for m in _imports(tree) if m.startswith("qlora_retrain.")]
        # Modules of other packages are not followed: the constants that a file uses are hashed one by one.
        queue += [library_file for module in modules if (library_file := _library_file(root, module))]
        yield str(path.relative_to(root)), tree


@lru_cache(maxsize=1024)
def _parse(source: bytes) -> ast.Module:
    """Parse a file without its docstrings; six steps share most files, so each is parsed once."""
    return _without_docstrings(ast.parse(source))


@lru_cache(maxsize=1024)
def _digest(tree: ast.Module) -> str:
    return hashing.sha256_json(ast.dump(tree))


@lru_cache(maxsize=1024)
def _names(tree: ast.Module) -> tuple[ast.Import | ast.ImportFrom | ast.Attribute, ...]:
    """Return the nodes that may name another module, once for all the steps that share the file."""
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute))


def _imports(tree: ast.Module) -> Iterator[str]:
    """Yield every module named by an import; `from a import b` names both `a` and `a.b`."""
    for node in _names(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _library_file(root: Path, dotted: str) -> Path | None:
    """Return the file of a module in a hashed package; None for any other name."""
    return _module_file(root, dotted) if dotted.partition(".")[0] in HASHED_PACKAGES else None


def library_uses(root: Path, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of everything that a file uses from library modules that are not hashed.

    The module is given below `qlora_retrain`, e.g. ("core.graph", "PROFILE").
    """
    # Local name -> module, e.g. "graph" -> "core.graph".
    modules: dict[str, str] = {}
    for node in _names(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("qlora_retrain"):
            continue
        package = node.module.removeprefix("qlora_retrain").removeprefix(".")  # type: ignore[union-attr]
        if package.partition(".")[0] in HASHED_PACKAGES:
            continue

        for alias in node.names:
            dotted = f"{package}.{alias.name}".removeprefix(".")
            if _module_file(root, dotted):
                modules[alias.asname or alias.name] = dotted
            else:
                yield package, alias.name

    # `graph.PROFILE_PATH`: an attribute of an imported module.
    for node in _names(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


def constants(root: Path, tree: ast.Module) -> dict[str, str]:
    """Return the source of each constant that a file uses from library modules that are not hashed, by name."""
    sources = {}
    for module, name in library_uses(root, tree):
        path = _module_file(root, module)
        for node in _parse(path.read_bytes()).body if path else ():
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets):
                sources[f"{module}.{name}"] = ast.unparse(node.value)
    return sources


def _module_file(root: Path, dotted: str) -> Path | None:
    """Return the file of a library module; None for a name that is no module."""
    base = root / "src" / "qlora_retrain" / Path(*dotted.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """Remove every docstring of the tree, in place."""
    # Not `ast.walk`: nine of ten nodes are parts of expressions, and no expression has a docstring.
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        queue += (n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.excepthandler | ast.match_case))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            is_string = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if is_string and isinstance(first.value.value, str):  # type: ignore[union-attr]
                node.body = node.body[1:]
    return tree


def _pinned(root: Path, modules: set[str]) -> dict[str, str]:
    """Return the pinned version of each module's project, and of those that it implies.

    Raises:
        UsageError: If constraints.txt pins no version of one.
    """
    # The pinned versions, not the installed ones: a checkout and an image must agree.
    pins = _pins(root / "constraints.txt")
    required = modules | {implied for m in modules for implied in IMPLIED.get(m, ())}
    missing = sorted(m for m in required if _project(m) not in pins)
    if missing:
        raise UsageError(
            f"constraints.txt: pins no version of {', '.join(missing)}; without it a result cannot be repeated"
        )
    return {m: pins[_project(m)] for m in sorted(required)}


def _project(module: str) -> str:
    """Return the name of the module's project on a package index."""
    return {"yaml": "pyyaml", "sklearn": "scikit-learn"}.get(module, module.replace("_", "-").lower())


@cache
def _pins(path: Path) -> dict[str, str]:
    """Read `name==version` lines; names are normalized as package indexes do (PEP 503)."""
    if not path.is_file():
        raise UsageError(f"{path}: not found; it pins the packages that shape results")
    pairs = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[._]+", "-", name).lower(): version for name, version in pairs}
