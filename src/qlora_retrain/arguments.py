"""The command line parser of `qlora-retrain` and of every step: usage errors have the exit code of `errors.py`."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from qlora_retrain.errors import Exit


class Parser(argparse.ArgumentParser):
    """argparse, but with our exit code for what it refuses."""

    def error(self, message: str) -> NoReturn:
        """Say how the command is used, and end."""
        self.print_usage(sys.stderr)
        self.exit(Exit.USAGE, f"{self.prog}: {message}\n")
