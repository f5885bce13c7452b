"""The command line. Every verb imports what it needs when it runs, so that `--help` stays fast.

Command: `qlora-retrain VERB --help`
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qlora_retrain.cli import kfp
from qlora_retrain.core.arguments import Parser, root
from qlora_retrain.core.errors import Exit, Problem, UsageError

if TYPE_CHECKING:
    from qlora_retrain.pipeline.plan import Plan


def _graph(args: argparse.Namespace) -> int:
    from qlora_retrain.core import graph

    print(graph.as_mermaid() if args.format == "mermaid" else graph.as_text())
    return 0


def _check(args: argparse.Namespace) -> int:
    from qlora_retrain.config.line import load

    config = load(args.config, args.set)
    print(f"{args.config}: line {config.line} is valid")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from qlora_retrain.pipeline import explain, kfp_outputs, plan

    overrides = [*args.set, *args.set_json]
    if args.plan:
        made = _given_plan(args, overrides)
    else:
        made = plan.make(_line(args), root(args), overrides=overrides, orchestrator=args.orchestrator_id)
    text = explain.as_text(made)
    print(text)
    if args.report_to is not None:
        kfp_outputs.put(args.report_to, f"```\n{text}\n```\n")
    if args.uri_to is not None:
        kfp_outputs.put(args.uri_to, made.uri)
    return 0


def _line(args: argparse.Namespace) -> Path | str:
    """The line that is meant: a file, or the document itself."""
    found: Path | str = args.config or args.document
    return found


def _given_plan(args: argparse.Namespace, overrides: list[str]) -> Plan:
    """Another run's plan, if it is one of this line."""
    from qlora_retrain.config.line import load
    from qlora_retrain.pipeline.plan import Plan

    if overrides:
        raise UsageError(f"--plan with {', '.join(overrides)}: a plan is made already; change settings without --plan")
    line, made = load(_line(args)).line, Plan.load(args.plan)
    if made.line != line:
        raise UsageError(f"{made.uri}: is a plan of line {made.line}; the line given is {line}")
    return made


def _run(args: argparse.Namespace) -> int:
    from qlora_retrain.pipeline import explain, plan
    from qlora_retrain.runtimes import local

    if args.plan is not None:
        made = plan.Plan.load(args.plan)
    elif args.config is not None:
        made = plan.make(args.config, root(args), overrides=args.set)
    else:
        raise UsageError("run: wanted a CONFIG, or --plan URI to finish another run's plan")
    print(explain.as_text(made), flush=True)
    if made.unchanged:
        return 0
    code = local.run(made)
    if code == 0:
        print(explain.status_text(made))
    return code


def _status(args: argparse.Namespace) -> int:
    from qlora_retrain.pipeline import explain, kfp_outputs, run_page
    from qlora_retrain.pipeline.plan import Plan

    uri = args.plan or _plan_of_run(args)
    made = Plan.load(uri) if uri else None
    if made is None:
        text = page = decisive = "The run ended before it had a plan; the log of its first task says why."
    else:
        text, page, decisive = explain.status_text(made), run_page.page(made), run_page.decisive_page(made)
    print(text)
    if args.page is not None:
        kfp_outputs.put(args.page, page)
    if args.report_to is not None:
        kfp_outputs.put(args.report_to, decisive)
    return 0


def _plan_of_run(args: argparse.Namespace) -> str | None:
    """Where the plan of the run that is meant is; None where an orchestrator's run never got one."""
    from qlora_retrain.config.line import load
    from qlora_retrain.pipeline import plan
    from qlora_retrain.storage import open_store

    store = open_store(root(args))
    run = args.run_id
    if args.document is not None:
        run = plan.known_run(store, load(args.document).line, args.orchestrator_id)
        return plan.plan_uri(store.uri, run) if run else None
    if run == "latest":
        run = max(store.children("runs"), default=None)
        if run is None:
            raise UsageError(f"{store.uri}: no runs yet")
    return plan.plan_uri(store.uri, run)


def _pull(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import open_store, pull

    release = pull.pull(open_store(root(args)), args.reference, args.destination)
    print(f"{release.line} {release.version}: {len(release.files)} files verified in {args.destination}")
    return 0


def _promote(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import open_store, registry

    if args.alias == registry.LATEST:
        raise UsageError(f"{registry.LATEST} names the newest version by itself; promote another alias")
    store = open_store(root(args))
    release = registry.read_release(store, args.line, args.version)
    moved = registry.move(store, args.line, args.alias, release, reason=args.reason, override=args.override)
    print(f"{args.line}@{args.alias}: {release.version}" + ("" if moved else " (already)"))
    return 0


def _rollback(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import open_store, registry

    moved = registry.rollback(open_store(root(args)), args.line, args.alias, reason=args.reason)
    print(f"{args.line}@{args.alias}: {moved.version}, generation {moved.generation}; what it left is rejected")
    return 0


def _drop(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import artifact, open_store

    store = open_store(root(args))
    dropped = artifact.drop(store, args.artifact, args.key)
    if not dropped:
        raise UsageError(f"no artifact {args.artifact}/{args.key} in {store.uri}")
    print(f"dropped {', '.join(dropped)}; the next run makes them again")
    return 0


def _ask(args: argparse.Namespace) -> int:
    from qlora_retrain.cli import ask

    folder, system = ask.model_folder(args.folder)
    found = ask.answers(folder, args.question, args.system or system)
    for answer in found:
        print(answer if len(found) == 1 else " ".join(answer.split()))  # of several, a line each
    return 0


def _orchestrator_id(text: str) -> str:
    """An id that an orchestrator really filled in: the same text for two runs would give both one plan."""
    if not text.strip() or "{{" in text:
        raise argparse.ArgumentTypeError(f"wanted the id of one run, found {text!r}, which no orchestrator filled in")
    return text


def _json_settings(text: str) -> list[str]:
    import json

    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise argparse.ArgumentTypeError(f'wanted a list like ["train.learning_rate=1e-4"], found {text}')
    return found


def _parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    stored = Parser(add_help=False, parents=[common])
    stored.add_argument("--root", metavar="URI", help="the store: file:///folder or s3://bucket/prefix")
    by_orchestrator = Parser(add_help=False)
    by_orchestrator.add_argument(
        "--orchestrator-id",
        action="append",
        default=[],
        type=_orchestrator_id,
        metavar="ID",
        help="what names the run outside; the same ids find the same plan again",
    )
    by_orchestrator.add_argument("--report-to", type=Path, metavar="FILE", help="write what a UI shows there")
    settings = Parser(add_help=False)
    settings.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change a setting")

    parser = Parser(
        prog="qlora-retrain", description="Retrain with QLoRA, judge by measurement, publish what others can trust."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = verbs.add_parser("graph", help="print the pipeline's graph", parents=[common])
    verb.add_argument("--format", choices=("text", "mermaid"), default="text")
    verb.set_defaults(run=_graph)

    verb = verbs.add_parser("check", help="check a line's YAML: all errors at once", parents=[common, settings])
    verb.add_argument("config", type=Path)
    verb.set_defaults(run=_check)

    verb = verbs.add_parser(
        "plan",
        help="say what is made already and what would run, and why",
        parents=[stored, settings, by_orchestrator],
    )
    line = verb.add_mutually_exclusive_group(required=True)
    line.add_argument("config", type=Path, nargs="?", help="the line's YAML file")
    line.add_argument("--document", metavar="TEXT", help="the line itself, as YAML or JSON")
    verb.add_argument("--plan", metavar="URI", help="check this plan instead of making one; empty: make one")
    verb.add_argument("--set-json", type=_json_settings, default=[], metavar="LIST", help="as --set, a JSON list")
    verb.add_argument("--uri-to", type=Path, metavar="FILE", help="write the plan's URI there")
    verb.set_defaults(run=_plan)

    verb = verbs.add_parser("run", help="run the whole pipeline, a subprocess a step", parents=[stored, settings])
    verb.add_argument("config", type=Path, nargs="?")
    verb.add_argument("--plan", metavar="URI", help="finish this plan instead of making one")
    verb.set_defaults(run=_run)

    verb = verbs.add_parser("status", help="where a run stands", parents=[stored, by_orchestrator])
    run = verb.add_mutually_exclusive_group(required=True)
    run.add_argument("run_id", metavar="RUN", nargs="?", help="a run's id, or latest")
    run.add_argument("--document", metavar="TEXT", help="a line, whose run --orchestrator-id names")
    verb.add_argument("--plan", metavar="URI", help="the run of this plan instead")
    verb.add_argument("--page", type=Path, metavar="FILE", help="write the run as a page there")
    verb.set_defaults(run=_status)

    verb = verbs.add_parser("pull", help="fetch a published version, verified", parents=[stored])
    verb.add_argument("reference", metavar="LINE@ALIAS")
    verb.add_argument("destination", metavar="DEST", type=Path)
    verb.set_defaults(run=_pull)

    verb = verbs.add_parser("promote", help="point an alias at a version", parents=[stored])
    verb.add_argument("line")
    verb.add_argument("version")
    verb.add_argument("--alias", default="production")
    verb.add_argument("--reason", required=True)
    verb.add_argument("--override", action="store_true", help="promote content that a rollback has rejected")
    verb.set_defaults(run=_promote)

    verb = verbs.add_parser("rollback", help="move an alias back and reject what it leaves", parents=[stored])
    verb.add_argument("line")
    verb.add_argument("--alias", default="production")
    verb.add_argument("--reason", required=True)
    verb.set_defaults(run=_rollback)

    verb = verbs.add_parser("drop", help="remove an artifact so that it is made again", parents=[stored])
    verb.add_argument("artifact")
    verb.add_argument("key")
    verb.set_defaults(run=_drop)

    kfp.add_verbs(verbs.add_parser("kfp", help="the pipeline on Kubeflow Pipelines"), common, stored, settings)

    verb = verbs.add_parser("ask", help="ask a pulled version, or any model folder, questions", parents=[common])
    verb.add_argument("folder", type=Path)
    verb.add_argument("question", nargs="+", help="each is asked by itself; of several, each answer is a line")
    verb.add_argument("--system", help="system turn; default: the one that the version was trained with")
    verb.set_defaults(run=_ask)
    return parser


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a verb and end the process with its exit code; a user's mistake is a line, not a traceback."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        sys.exit(args.run(args))
    except Problem as problem:
        if args.debug:
            raise
        print(f"qlora-retrain: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
    except BrokenPipeError:  # whoever read us, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.DONE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if args.debug:
            raise
        print(f"qlora-retrain: our bug: {type(error).__name__}: {error}; --debug shows where", file=sys.stderr)
        sys.exit(Exit.BUG)
