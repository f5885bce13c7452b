"""The verb `mirror`: copy a published version to the Hugging Face Hub or to MLflow."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from qlora_retrain.cli.options import Options, line_name
from qlora_retrain.core.arguments import store_root


def add_verbs(verbs: Any, options: Options) -> None:
    """Add the verb to a parser's subparsers."""
    description = "copy a published version to the Hugging Face Hub, or register it in MLflow"
    verb = verbs.add_parser("mirror", help=description, parents=[options.stored])
    verb.add_argument("line", type=line_name, help="the line's name")
    verb.add_argument("version", help="a version, or an alias such as production")
    verb.add_argument(
        "--to", required=True, metavar="URI", help="hf://owner/name (a repository that exists), or mlflow"
    )
    verb.set_defaults(run=_mirror)


def _mirror(args: argparse.Namespace) -> int:
    from qlora_retrain.core import signals
    from qlora_retrain.storage import mirror, open_store, signatures

    store = open_store(store_root(args))
    print(signatures.describe(store), file=sys.stderr)
    with signals.terminate_as_interrupt():
        mirrored = mirror.mirror(store, args.line, args.version, args.to)
    state = "put" if mirrored.is_new else "was"
    text = f"{args.line} {mirrored.version}: {state} at {mirrored.place}, verified"
    print(f"{text}, and is production there" if mirrored.is_production else text)
    return 0
