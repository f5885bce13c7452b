"""The verbs on published versions and artifacts: pull, promote, rollback, drop, ask."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.cli.json_output import add_json, print_json
from qlora_retrain.cli.options import Options, destination, generation, line_name
from qlora_retrain.core import visible_text
from qlora_retrain.core.arguments import store_root
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.core.visible_text import escape_controls

if TYPE_CHECKING:
    from qlora_retrain.registry import Registry
    from qlora_retrain.storage.moves import Request


def add_verbs(verbs: Any, options: Options) -> None:
    """Add the verbs to a parser's subparsers."""
    add_shared_verbs(verbs, options)

    verb = verbs.add_parser("drop", help="delete an artifact, and all that was made from it", parents=[options.stored])
    verb.add_argument("artifact", help="e.g. dataset; `qlora-retrain graph` lists them")
    verb.add_argument("key", help="all 64 hex digits")
    verb.set_defaults(run=_drop)

    description = "ask a pulled version, or any model folder, questions"
    verb = verbs.add_parser("ask", help=description, parents=[options.stored])
    verb.add_argument("folder", type=Path, help="a pulled version, or a model folder; with --adapter: a base model")
    verb.add_argument(
        "--base", type=Path, metavar="FOLDER", help="the base model of a version that is an adapter alone"
    )
    verb.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=VERSION",
        help="a pulled version, LINE@ALIAS, or an adapter's folder (repeatable); each answers each question",
    )
    verb.add_argument("question", nargs="+", help="each is asked separately; with several, each answer is one line")
    verb.add_argument("--system", help="the system turn; default: that of the version's training")
    verb.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="TOKENS",
        default=64,
        help="a longer answer is cut, with a note; default: 64",
    )
    verb.set_defaults(run=_ask)


def add_shared_verbs(verbs: Any, options: Options) -> None:
    """Add the verbs that are also below `models`: pull, promote, rollback, history."""
    verb = verbs.add_parser("pull", help="download a published version and verify every file", parents=[options.stored])
    verb.add_argument("reference", metavar="LINE@ALIAS", help="or LINE@VERSION")
    verb.add_argument("destination", metavar="DEST", type=destination, help="a new folder, or that of an earlier pull")
    verb.add_argument(
        "--min-generation",
        type=generation,
        default=0,
        metavar="N",
        help="refuse an alias that moved fewer times than this",
    )
    verb.add_argument(
        "--verify-key",
        metavar="KEY",
        help="the publisher's public key, as a PEM file or the fingerprint that `keys show` prints",
    )
    verb.add_argument("--sha256", metavar="HEX", help="refuse a version whose manifest has another sha256")
    verb.add_argument(
        "--parts",
        action="append",
        default=[],
        metavar="PART",
        help="only adapter, model, or exports/NAME (repeatable), with the card and the reports; default: everything",
    )
    add_json(verb)
    verb.set_defaults(run=_pull)

    verb = verbs.add_parser("promote", help="point an alias at a version", parents=[options.stored])
    verb.add_argument("line", type=line_name, help="the line's name")
    verb.add_argument("version", help="a published version of the line")
    verb.add_argument("--alias", default="production", help="default: production")
    verb.add_argument("--reason", required=True, help="a sentence for the audit trail")
    verb.add_argument("--override", action="store_true", help="promote a version that was rejected")
    _add_request(verb)
    add_json(verb)
    verb.set_defaults(run=_promote)

    verb = verbs.add_parser(
        "rollback", help="move an alias back, and reject the version that it leaves", parents=[options.stored]
    )
    verb.add_argument("line", type=line_name, help="the line's name")
    verb.add_argument("--alias", default="production", help="default: production")
    verb.add_argument("--reason", required=True, help="a sentence for the audit trail")
    verb.add_argument("--to", metavar="VERSION", help="refuse to go back to another version")
    _add_request(verb)
    add_json(verb)
    verb.set_defaults(run=_rollback)

    verb = verbs.add_parser("history", help="print who moved an alias of a line, and when", parents=[options.stored])
    verb.add_argument("line", type=line_name, help="the line's name")
    add_json(verb)
    verb.set_defaults(run=_history)


def _add_request(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--from",
        dest="current",
        metavar="VERSION",
        help="the version that the alias names, as you saw it (none: no version); refused if it names another one, and "
        "the same command again does nothing",
    )
    verb.add_argument("--request", metavar="ID", help="hexadecimal; a request that is repeated with it moves once")
    verb.add_argument("--triggered-by", metavar="SYSTEM:NAME", help="for the audit trail, e.g. airflow:alice")


def _pull(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import open_store, pull, version_parts
    from qlora_retrain.storage.keys import read_fingerprint

    # Every file is verified before any of them appears at the destination.
    with resumable():
        release = pull.pull(
            open_store(store_root(args)),
            args.reference,
            args.destination,
            min_generation=args.min_generation,
            verify_key=None if args.verify_key is None else read_fingerprint(args.verify_key),
            sha256=args.sha256,
            parts=args.parts,
        )
    num_files = len(version_parts.select(release, args.parts))
    signer = pull.recorded_signer(args.destination)
    if args.json:
        place = os.path.realpath(args.destination)
        print_json(
            {"line": release.line, "version": release.version, "files": num_files, "destination": place,
             "manifest_sha256": release.sha256, "signer": signer}
        )  # fmt: skip
        return 0
    print(f"{release.line} {release.version}: {num_files} files verified in {args.destination}")
    print(f"its manifest has the sha256 {release.sha256}", file=sys.stderr)
    print(f"signed by {signer}" if signer else "unsigned: nothing proves who published it", file=sys.stderr)
    return 0


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Run a download that the same command continues; after SIGINT or SIGTERM say so, and end the process."""
    from qlora_retrain.core import signals

    try:
        with signals.terminate_as_interrupt():
            yield
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr, flush=True)
        # Not `raise`: Python would wait for the threads that read, as long as a server that hangs lets them wait.
        os._exit(128 + signal.SIGINT)


def open_registry(args: argparse.Namespace) -> Registry:
    """Open the store; say on the other stream whether its documents are signed."""
    from qlora_retrain.registry import Registry
    from qlora_retrain.storage import signatures

    registry = Registry(store_root(args))
    print(signatures.describe(registry.store), file=sys.stderr)
    return registry


def _promote(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import moves

    moved = moves.promote(open_registry(args).store, request_of(args), args.version, override=args.override)
    if args.json:
        print_json({"line": args.line, "alias": args.alias, "version": args.version, "moved": moved is not None})
    else:
        print(f"{args.line}@{args.alias}: {args.version}" + ("" if moved else " (already)"))
    return 0


def _rollback(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import moves

    # Rejected by content and recipe: the next run may make the same model again and must not promote it.
    alias = moves.rollback(open_registry(args).store, request_of(args), args.to)
    left = alias.moves[-1].version
    if args.json:
        print_json({"line": args.line, "alias": args.alias, "version": alias.version, "left": left,
                    "generation": alias.generation})  # fmt: skip
    else:
        print(f"{args.line}@{args.alias}: {alias.version}, generation {alias.generation}; {left} is rejected")
    return 0


def request_of(args: argparse.Namespace) -> Request:
    """Return the move that the arguments ask for."""
    from qlora_retrain.storage import actor, moves

    if args.triggered_by:
        actor.name_orchestrator(args.triggered_by)
    return moves.Request(args.line, args.alias, args.reason, current=args.current, request_id=args.request)


def _history(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import audit, published_lines

    store = open_registry(args).store
    states, faults = audit.history(store, args.line)
    if not states and not faults:
        raise published_lines.no_such_line(store, args.line)
    if args.json:
        print_json([{"alias": name, **state.model_dump(exclude={"signature", "moves"})} for name, state in states])
    for name, state in states if not args.json else ():
        # What most moves are is left out; else a rejection would look like one more move to the same version.
        action = "" if state.action in (None, "promote") else f" ({state.action})"
        move = f"{state.at}  {name} {state.generation}: {state.version}{action}  {state.actor}  {state.reason}"
        # One line a move, so that no reason can pass for a further one.
        visible_text.write_controls(f"{escape_controls(move.replace(chr(10), ' '))}\n")
    if faults:
        hint = f"an entry that its writer could not write is written by: {audit.repair_command(store, args.line)}"
        raise IntegrityError("\n".join(["the audit trail was changed:", *faults, hint]))
    return 0


def _drop(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import artifact

    store = open_registry(args).store
    dropped = artifact.drop(store, args.artifact, args.key)
    if not dropped:
        raise UsageError(f"{store.uri}: no artifact {args.artifact}/{args.key}")
    print(f"dropped {', '.join(dropped)}; the next run makes them again")
    return 0


def _ask(args: argparse.Namespace) -> int:
    from qlora_retrain.cli import ask
    from qlora_retrain.cli.ask_adapters import Adapter
    from qlora_retrain.storage.pulled_folder import reading

    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: expected at least 1, got {args.max_new_tokens}")
    questions = ask.Questions(args.question, args.system, args.max_new_tokens)
    if args.adapter:
        if args.base is not None:
            raise UsageError("--base: with --adapter the folder itself is the base; leave --base out")
        adapters = [Adapter.from_argument(argument, partial(store_root, args)) for argument in args.adapter]
        by_name = ask.answers_of_adapters(args.folder, adapters, questions)
    else:
        # The next pull leaves this version where it is until the answers are there.
        with reading(args.folder) as folder:
            by_name = {"": ask.answers(folder, questions, args.base, args.root)}

    # Of several answers, each is one line; of several adapters, it begins with the adapter's name.
    is_single = len(by_name) == len(args.question) == 1
    for number in range(len(args.question)):
        for name, answers in by_name.items():
            answer = answers[number]
            text = answer.text if is_single else " ".join(answer.text.split())
            text = f"{name}: {text}" if len(by_name) > 1 else text
            # A program reads every character of an answer; a terminal would obey some of them.
            visible_text.write_controls(f"{escape_controls(text) if sys.stdout.isatty() else text}\n")
            # On the other stream, so that a program reads answers alone.
            if not answer.ended:
                of_adapter = f" of {name}" if len(by_name) > 1 else ""
                print(
                    f"note: answer {number + 1}{of_adapter} was cut after {len(answer.ids)} tokens; the model had not "
                    "ended it. --max-new-tokens allows more",
                    file=sys.stderr,
                )
    return 0
