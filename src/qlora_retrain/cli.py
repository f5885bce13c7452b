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

from qlora_retrain.arguments import Parser
from qlora_retrain.errors import Exit, Problem, UsageError

if TYPE_CHECKING:
    from qlora_retrain.plan import Plan


def _graph(args: argparse.Namespace) -> int:
    from qlora_retrain import graph

    print(graph.as_mermaid() if args.format == "mermaid" else graph.as_text())
    return 0


def _check(args: argparse.Namespace) -> int:
    from qlora_retrain.config.load import load

    config = load(args.config, args.set)
    print(f"{args.config}: line {config.line} is valid")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from qlora_retrain import explain, plan

    overrides = [*args.set, *args.set_json]
    if args.plan:
        made = _given_plan(args, overrides)
    else:
        made = plan.make(args.config, _root(args), overrides=overrides, orchestrator=args.orchestrator_id)
    print(explain.as_text(made))
    if args.uri_to is not None:
        args.uri_to.parent.mkdir(parents=True, exist_ok=True)
        args.uri_to.write_text(made.uri, encoding="utf-8")
    return 0


def _given_plan(args: argparse.Namespace, overrides: list[str]) -> Plan:
    """Another run's plan, if it is one of this line."""
    from qlora_retrain.config.load import load
    from qlora_retrain.plan import Plan

    if overrides:
        raise UsageError(f"--plan with {', '.join(overrides)}: a plan is made already; change settings without --plan")
    line, made = load(args.config).line, Plan.load(args.plan)
    if made.line != line:
        raise UsageError(f"{made.uri}: is a plan of line {made.line}; {args.config} is line {line}")
    return made


def _run(args: argparse.Namespace) -> int:
    from qlora_retrain import explain, plan
    from qlora_retrain.runtimes import local

    if args.plan is not None:
        made = plan.Plan.load(args.plan)
    elif args.config is not None:
        made = plan.make(args.config, _root(args), overrides=args.set)
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
    from qlora_retrain import explain, plan
    from qlora_retrain.store import open_store

    store = open_store(_root(args))
    run = args.run_id
    if run == "latest":
        runs = list(store.children("runs"))
        if not runs:
            raise UsageError(f"{store.uri}: no runs yet")
        run = max(runs)
    print(explain.status_text(plan.Plan.load(plan.plan_uri(store.uri, run))))
    return 0


def _pull(args: argparse.Namespace) -> int:
    from qlora_retrain import consumer
    from qlora_retrain.store import open_store

    release = consumer.pull(open_store(_root(args)), args.reference, args.destination)
    print(f"{release.line} {release.version}: {len(release.files)} files verified in {args.destination}")
    return 0


def _promote(args: argparse.Namespace) -> int:
    from qlora_retrain import registry
    from qlora_retrain.store import open_store

    if args.alias == registry.LATEST:
        raise UsageError(f"{registry.LATEST} names the newest version by itself; promote another alias")
    store = open_store(_root(args))
    release = registry.read_release(store, args.line, args.version)
    moved = registry.move(store, args.line, args.alias, release, reason=args.reason, override=args.override)
    print(f"{args.line}@{args.alias}: {release.version}" + ("" if moved else " (already)"))
    return 0


def _rollback(args: argparse.Namespace) -> int:
    from qlora_retrain import registry
    from qlora_retrain.store import open_store

    moved = registry.rollback(open_store(_root(args)), args.line, args.alias, reason=args.reason)
    print(f"{args.line}@{args.alias}: {moved.version}, generation {moved.generation}; what it left is rejected")
    return 0


def _drop(args: argparse.Namespace) -> int:
    from qlora_retrain import artifact
    from qlora_retrain.store import open_store

    store = open_store(_root(args))
    dropped = artifact.drop(store, args.artifact, args.key)
    if not dropped:
        raise UsageError(f"no artifact {args.artifact}/{args.key} in {store.uri}")
    print(f"dropped {', '.join(dropped)}; the next run makes them again")
    return 0


def _ask(args: argparse.Namespace) -> int:
    from qlora_retrain import ask

    folder, system = ask.model_folder(args.folder)
    print(ask.answer(folder, args.question, args.system or system))
    return 0


def _kfp_compile(args: argparse.Namespace) -> int:
    from qlora_retrain import code, images

    try:
        from qlora_retrain.runtimes import kubeflow
    except ModuleNotFoundError as error:
        if error.name != "kfp":
            raise
        raise UsageError(
            f"kfp is not in this environment ({sys.prefix}), it has one of its own; "
            "run it with .venv-kfp/bin/qlora-retrain"
        ) from error
    out = args.out or code.project_root() / ".state" / "kfp" / "retrain.yaml"
    given = {"light": args.light_image, "train": args.train_image}
    refs = {name: given[name] or default for name, default in images.DEFAULT.items()}
    kubeflow.compile_to(out, refs)
    print(f"{out}: pipeline retrain of {', '.join(refs.values())}")
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


def _root(args: argparse.Namespace) -> str:
    root = args.root or os.environ.get("QLORA_RETRAIN_ROOT")
    if not root:
        raise UsageError("no store: pass --root URI (file:///folder or s3://bucket/prefix) or set QLORA_RETRAIN_ROOT")
    return str(root)


def _parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    stored = Parser(add_help=False, parents=[common])
    stored.add_argument("--root", metavar="URI", help="the store: file:///folder or s3://bucket/prefix")
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
        "plan", help="say what is made already and what would run, and why", parents=[stored, settings]
    )
    verb.add_argument("config", type=Path)
    verb.add_argument("--plan", metavar="URI", help="check this plan instead of making one; empty: make one")
    verb.add_argument(
        "--orchestrator-id",
        action="append",
        default=[],
        type=_orchestrator_id,
        metavar="ID",
        help="what names the run outside; the same ids find the same plan again",
    )
    verb.add_argument("--set-json", type=_json_settings, default=[], metavar="LIST", help="as --set, a JSON list")
    verb.add_argument("--uri-to", type=Path, metavar="FILE", help="write the plan's URI there")
    verb.set_defaults(run=_plan)

    verb = verbs.add_parser("run", help="run the whole pipeline, a subprocess a step", parents=[stored, settings])
    verb.add_argument("config", type=Path, nargs="?")
    verb.add_argument("--plan", metavar="URI", help="finish this plan instead of making one")
    verb.set_defaults(run=_run)

    verb = verbs.add_parser("status", help="where a run stands", parents=[stored])
    verb.add_argument("run_id", metavar="RUN", help="a run's id, or latest")
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

    verb = verbs.add_parser("kfp", help="the pipeline for Kubeflow Pipelines")
    kfp_verbs = verb.add_subparsers(required=True, metavar="VERB")
    verb = kfp_verbs.add_parser("compile", help="write the YAML that KFP takes; needs .venv-kfp", parents=[common])
    verb.add_argument("--out", type=Path, metavar="FILE", help="default: .state/kfp/retrain.yaml")
    verb.add_argument("--light-image", metavar="REF", help="image without torch, by tag or digest")
    verb.add_argument("--train-image", metavar="REF", help="image with the training stack, by tag or digest")
    verb.set_defaults(run=_kfp_compile)

    verb = verbs.add_parser("ask", help="ask a pulled version, or any model folder, a question", parents=[common])
    verb.add_argument("folder", type=Path)
    verb.add_argument("question")
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


if __name__ == "__main__":
    main()
