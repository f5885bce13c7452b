"""The command line. Every verb imports what it needs when it runs, so that `--help` stays fast.

Command: `qlora-retrain VERB --help`
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import NoReturn

from qlora_retrain.cli import clusters, gc, golden, keys, kfp, lab, methods, mirrors, models, policies, runs, versions
from qlora_retrain.cli.options import shared_options
from qlora_retrain.core import uris, visible_text
from qlora_retrain.core.arguments import Parser
from qlora_retrain.core.errors import Exit, Problem


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qlora-retrain",
        description="Retrain a language model with QLoRA, decide by measurement whether it may ship, and publish it.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    options = shared_options()
    runs.add_verbs(verbs, options)
    lab.add_verbs(verbs, options)
    versions.add_verbs(verbs, options)
    models.add_verbs(verbs.add_parser("models", help="list, verify, move and repair published models"), options)
    gc.add_verbs(verbs, options)
    mirrors.add_verbs(verbs, options)
    golden.add_verbs(verbs, options)
    methods.add_verbs(verbs, options)
    keys.add_verbs(
        verbs.add_parser("keys", help="create, show and rotate the keys that sign a store's documents"), options
    )
    policies.add_verbs(verbs, options)
    clusters.add_verbs(verbs, options)
    kfp.add_verbs(verbs.add_parser("kfp", help="run the pipeline on Kubeflow Pipelines"), options)
    return parser


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a verb and end the process with its exit code; print an error as one line, unless --debug is set."""
    visible_text.protect_output()
    args = _parser().parse_args(argv)
    try:
        code = args.run(args)
        # Here, since an error at the end of the process has no exit code of ours.
        sys.stdout.flush()
        sys.exit(code)
    except Problem as problem:
        if args.debug:
            raise
        print(f"qlora-retrain: {uris.mask_secrets_of_errors(str(problem))}", file=sys.stderr)
        _drop_unwritable_output()
        sys.exit(problem.exit_code)
    # `qlora-retrain status latest | head -1` must not end in a traceback.
    except BrokenPipeError:
        _drop_unwritable_output()
        sys.exit(Exit.DONE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if args.debug:
            raise
        text = uris.mask_secrets_of_errors(f"{type(error).__name__}: {error}")
        print(f"qlora-retrain: internal error: {text}; run it with --debug to see where", file=sys.stderr)
        sys.exit(Exit.BUG)


def _drop_unwritable_output() -> None:
    """Lead what could not be written nowhere, or Python would try again at its end, and change the exit code."""
    try:
        sys.stdout.flush()
    except (Problem, OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
