"""The command line parser of `qlora-retrain` and of every step: usage errors have the exit code of `errors.py`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from qlora_retrain.core.errors import Exit, UsageError


class Parser(argparse.ArgumentParser):
    """argparse, but with our exit code for what it refuses."""

    def error(self, message: str) -> NoReturn:
        """Say how the command is used, and end."""
        self.print_usage(sys.stderr)
        self.exit(Exit.USAGE, f"{self.prog}: {message}\n")


def root(args: argparse.Namespace) -> str:
    """The store's URI, from the command line or the environment.

    Raises:
        UsageError: If neither says.
    """
    found = args.root or os.environ.get("QLORA_RETRAIN_ROOT")
    if not found:
        raise UsageError("no store: pass --root URI (file:///folder or s3://bucket/prefix) or set QLORA_RETRAIN_ROOT")
    return str(found)
