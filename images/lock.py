"""Write an image's lock file: every package that it installs, each with the sha256 of the one wheel allowed.

Reads constraints.txt and the extras of pyproject.toml; asks the package index, installs nothing. The locks are for the
images' platform, CPython 3.11 on Linux x86-64.

Command: `make lock` (the CPU images), `make lock-cuda` (the train image with the CUDA build of torch)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Resolve the extras and write the lock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lock", type=Path, help="the file to write, e.g. images/light.lock")
    parser.add_argument("extras", nargs="+", help="extras of pyproject.toml, e.g. light")
    parser.add_argument("--note", default="", help="a sentence for the file's first line")
    arguments = parser.parse_args()

    packages = resolve(arguments.extras)
    # The hashes hold for one platform and one Python, so the file names both.
    head = f"# {arguments.note}\n" if arguments.note else ""
    extras = ", ".join(arguments.extras)
    head += f"# Made by images/lock.py from constraints.txt for: {extras}. Linux x86-64, CPython 3.11.\n"
    arguments.lock.write_text(head + "".join(map(entry, packages)), encoding="utf-8")
    print(f"{arguments.lock}: {len(packages)} packages")


def resolve(extras: list[str]) -> list[dict[str, Any]]:
    """Return what pip would install for the project's extras, sorted by name, without the project itself."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # Only wheels: building a source distribution would run its code here.
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--only-binary", ":all:", "--report", str(report), "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*command, f"{ROOT}[{','.join(extras)}]"], check=True)
        packages = json.loads(report.read_text(encoding="utf-8"))["install"]

    # `dir_info` marks what was installed from a folder: the project.
    return sorted(
        (p for p in packages if "dir_info" not in p["download_info"]), key=lambda p: p["metadata"]["name"].lower()
    )


def entry(package: dict[str, Any]) -> str:
    """Format one package of the lock; a local version label (`+cpu`) stays, because the hash is of that build."""
    name, version = package["metadata"]["name"].lower(), package["metadata"]["version"]
    return f"{name}=={version} \\\n    --hash=sha256:{package['download_info']['archive_info']['hashes']['sha256']}\n"


if __name__ == "__main__":
    main()
