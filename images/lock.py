"""Write a lock file: every package that is installed, each with its version and the sha256 of the files allowed.

Reads a file of pinned versions and the extras of pyproject.toml; asks the package indexes, installs nothing. An image's
lock is for one platform, CPython 3.11 on Linux x86-64, with the wheels of the index that is configured here. A portable
lock is for a developer's environment: it also allows PyPI's own wheels for x86-64 and for aarch64. So it holds with
PyPI alone and with a mirror. torch has two builds, for a CPU and for CUDA, and a lock for each.

Command: `make lock` (the environments and the CPU images), `make lock-cuda` (the train image with torch's CUDA build)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MACHINES = ("x86_64", "aarch64")
# From new to old, as pip asks for a platform: a wheel for an older one also runs on a newer one.
GLIBC_VERSIONS = [f"2_{minor}" for minor in range(28, 16, -1)]

Packages = dict[tuple[str, str], set[str]]  # (name, version) to the hashes of the files allowed


def main() -> None:
    """Resolve the extras and write the lock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lock", type=Path, help="the file to write, e.g. images/light.lock")
    parser.add_argument("extras", nargs="+", help="extras of pyproject.toml, e.g. light")
    parser.add_argument("--tools", action="store_true", help="only the extras, without what the project itself needs")
    parser.add_argument("--constraints", default="constraints.txt", help="the file of pinned versions")
    parser.add_argument("--portable", action="store_true", help="allow PyPI's wheels for x86-64 and aarch64 too")
    parser.add_argument("--also", nargs="*", default=[], help="NAME==VERSION to lock without what it requires")
    parser.add_argument("--source", default="", help="a package that has no wheel: its source distribution is allowed")
    parser.add_argument("--torch", type=Path, nargs=2, help="the files for torch's CPU build, and for its CUDA build")
    parser.add_argument("--note", default="", help="a sentence for the file's first line")
    arguments = parser.parse_args()

    # Only wheels: building a source distribution runs its code, here as well as where it is installed.
    kinds = ["--only-binary", ":all:", *(["--no-binary", arguments.source] if arguments.source else [])]
    constraints = ["-c", str(ROOT / arguments.constraints)]
    packages = locked(report([*kinds, *constraints, *requirements(arguments.extras, is_tools=arguments.tools)]))
    for requirement in arguments.also:
        packages |= locked(report([*kinds, "--no-deps", requirement]))

    note = f"# {arguments.note}\n" if arguments.note else ""
    head = f"{note}# Made by images/lock.py from {arguments.constraints} for: {', '.join(arguments.extras)}."
    # The hashes hold for these platforms and one Python, so the file names them.
    head += f" Linux x86-64{' and aarch64' if arguments.portable else ''}, CPython 3.11.\n"
    builds = torch_packages(packages, kinds) if arguments.torch else ()
    # The CPU build is on no index but PyTorch's, and stays with the one file that is there.
    packages = {package: hashes for package, hashes in packages.items() if not builds or package not in builds[0]}
    if arguments.portable:
        add_files_of_pypi({**packages, **(builds[1] if builds else {})}, kinds)
    write(arguments.lock, head, packages)
    for lock, build in zip(arguments.torch or (), builds, strict=True):
        write(lock, f"# A build of torch, and what it needs beyond {arguments.lock.name}.\n{head}", build)


def requirements(extras: Sequence[str], *, is_tools: bool) -> list[str]:
    """Return what pyproject.toml says that the project and its extras need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own: list[str] = [] if is_tools else project["dependencies"]
    return own + [requirement for extra in extras for requirement in project["optional-dependencies"][extra]]


def torch_packages(packages: Packages, kinds: Sequence[str]) -> tuple[Packages, Packages]:
    """Return torch's CPU build, and PyPI's build for CUDA with what that requires beyond `packages`."""
    cpu = {package: hashes for package, hashes in packages.items() if package[0] == "torch"}
    if not all(version.endswith("+cpu") for _, version in cpu):
        sys.exit("torch's CPU build is on no index that is configured here; set PIP_EXTRA_INDEX_URL to PyTorch's")
    pins = {name: f"{name}=={public(version)}" for name, version in packages}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins.values()))
        file.flush()
        closure = locked(report([*kinds, "-c", file.name, pins["torch"]], from_pypi=True))
    return cpu, {package: hashes for package, hashes in closure.items() if package[0] not in pins.keys() - {"torch"}}


def add_files_of_pypi(packages: Packages, kinds: Sequence[str]) -> None:
    """Allow the files too that PyPI itself gives each kind of machine."""
    pins = {f"{name}=={public(version)}": (name, version) for name, version in packages}
    for machine in MACHINES:
        platforms = [f"--platform=manylinux_{glibc}_{machine}" for glibc in GLIBC_VERSIONS]
        platforms += [f"--platform=manylinux2014_{machine}", f"--platform=linux_{machine}"]
        for (name, version), hashes in locked(report([*kinds, "--no-deps", *platforms, *pins], from_pypi=True)).items():
            packages[pins[f"{name}=={version}"]] |= hashes


def report(arguments: Sequence[str], *, from_pypi: bool = False) -> list[dict[str, Any]]:
    """Return the packages that `pip install` would install, as pip reports them.

    Args:
        arguments: Requirements and options of pip.
        from_pypi: Ask PyPI alone, and not the indexes that are configured here.
    """
    environment = dict(os.environ)
    if from_pypi:
        connection = ("PIP_CERT", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT")
        environment = {k: v for k, v in environment.items() if not k.startswith("PIP_") or k in connection}
        environment["PIP_CONFIG_FILE"] = os.devnull

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        # pip asks for a target where the platform is another one, and writes nothing there.
        command += ["--report", str(path), "--target", f"{folder}/none"]
        subprocess.run([*command, *arguments], check=True, env=environment)
        packages: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["install"]
        return packages


def locked(packages: Sequence[dict[str, Any]]) -> Packages:
    """Return names, versions and hashes of a report."""
    return {
        (package["metadata"]["name"].lower(), package["metadata"]["version"]): {
            package["download_info"]["archive_info"]["hashes"]["sha256"]
        }
        for package in packages
    }


def public(version: str) -> str:
    """Return a version without its local label (`+cpu`), which PyPI has not."""
    return version.partition("+")[0]


def write(lock: Path, head: str, packages: Packages) -> None:
    """Write the lock, sorted by name; a local version label stays, because the hash is of that build."""
    entries = []
    for (name, version), hashes in sorted(packages.items()):
        lines = [f"{name}=={version}"]
        lines += [f"    --hash=sha256:{sha256}" for sha256 in sorted(hashes)]
        entries.append(" \\\n".join(lines) + "\n")
    lock.write_text(head + "".join(entries), encoding="utf-8")
    print(f"{lock}: {len(entries)} packages")


if __name__ == "__main__":
    main()
