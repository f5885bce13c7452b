"""The benchmark of transfers runs to its end, on its own server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import publish

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.soak
def test_the_benchmark_compares_every_transfer_at_two_sizes() -> None:
    # 40 MiB travel in parts, 10 MiB too, but not where the server copies.
    command = [sys.executable, ROOT / "benchmarks" / "publish.py", "--mib", "40", "--rounds", "1"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for tools in publish._PAIRS:
        assert output.count(f"speed of {' / '.join(tools)}:") == 2
