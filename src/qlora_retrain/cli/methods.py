"""The verb on methods: methods."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from qlora_retrain.cli.options import Options


def add_verbs(verbs: Any, options: Options) -> None:
    """Add the verb to a parser's subparsers."""
    description = "print what each train.method can do: bases, forms that ship, and what serves them"
    verb = verbs.add_parser("methods", help=description, parents=[options.common])
    verb.add_argument("--json", action="store_true", help="print it as JSON")
    verb.set_defaults(run=_methods)


def _methods(args: argparse.Namespace) -> int:
    from qlora_retrain.config import methods

    if args.json:
        print(json.dumps([dataclasses.asdict(facts) for facts in methods.METHODS.values()], indent=2))
        return 0
    rows = methods.table()
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
