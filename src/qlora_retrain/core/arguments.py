"""The command line parser of `qlora-retrain` and of every step: a usage error ends with exit code 12."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from qlora_retrain.core.errors import Exit, UsageError

# Of a step's `--alias`: the plan decides which alias moves.
ANY_ALIAS = "*"
# Of what a person says who starts a run; the audit trail has it.
MAX_REASON_CHARACTERS = 500


class Parser(argparse.ArgumentParser):
    """An `argparse` parser that ends with our exit code for a usage error (12)."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message to stderr, and exit with 12."""
        # argparse itself exits with 2, a code that none of our runtimes knows.
        self.print_usage(sys.stderr)
        self.exit(Exit.USAGE, f"{self.prog}: {message}\n")


def store_root(args: argparse.Namespace) -> str:
    """Return the store's URI, from the command line or the environment.

    Raises:
        UsageError: If neither names a store.
    """
    # Of a shell's unset variable. The environment's store would be another one than the person meant.
    if args.root == "":
        raise UsageError("--root: expected file:///folder or s3://bucket/prefix, found an empty text")
    root = args.root or os.environ.get("QLORA_RETRAIN_ROOT")
    if not root:
        raise UsageError("no store: pass --root URI (file:///folder or s3://bucket/prefix) or set QLORA_RETRAIN_ROOT")
    return str(root)
