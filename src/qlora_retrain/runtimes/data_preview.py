"""Look at a line's data before anything is planned, by the code of the data gate itself, in a process of its own.

Commands: `qlora-retrain preview CONFIG`, `qlora-retrain check CONFIG --data`
"""

from __future__ import annotations

import json
import subprocess
import sys

from qlora_retrain.config.line import LineConfig, document
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.runtimes.local import step_environment


def preview(config: LineConfig, rows: int) -> int:
    """Print the first rows as the model sees them; return the exit code."""
    return _run(config, "--rows", str(rows))


def check(config: LineConfig) -> int:
    """Print what the data gate would say of the data; return the exit code that it would end with."""
    return _run(config, "--check")


def _run(config: LineConfig, *arguments: str) -> int:
    # The line goes in through the standard input: it may be longer than an argument can be.
    result = subprocess.run(
        [sys.executable, "-m", "components.data_preview", *arguments],
        input=json.dumps(document(config)),
        text=True,
        cwd=project_root(),
        env=step_environment(),
        check=False,
    )
    return result.returncode
