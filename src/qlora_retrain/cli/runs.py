"""The verbs on lines and runs: graph, check, plan, run, status."""

from __future__ import annotations

import argparse
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.cli.options import Options, json_list
from qlora_retrain.core import graph, graph_text, uris
from qlora_retrain.core.arguments import store_root
from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from qlora_retrain.pipeline.plan import Plan


def add_verbs(verbs: Any, options: Options) -> None:
    """Add the verbs to a parser's subparsers."""
    verb = verbs.add_parser("graph", help="print the pipeline's graph", parents=[options.common])
    verb.add_argument("--format", choices=("text", "mermaid"), default="text")
    verb.set_defaults(run=_graph)

    parents = [options.common, options.settings]
    verb = verbs.add_parser("check", help="check a line's YAML: all errors at once", parents=parents)
    verb.add_argument("config", type=Path, help="the line's YAML file")
    verb.add_argument(
        "--data", action="store_true", help="read the data too, and print what validate_data would report"
    )
    verb.set_defaults(run=_check)

    verb = verbs.add_parser(
        "preview", help="print rows as the model sees them, before anything is planned", parents=parents
    )
    verb.add_argument("config", type=Path, help="the line's YAML file")
    verb.add_argument("--rows", type=int, default=5, metavar="N", help="how many rows; default: 5")
    verb.set_defaults(run=_preview)

    parents = [options.stored, options.settings, options.orchestrator]
    verb = verbs.add_parser(
        "plan", help="print what exists already, what would run, why, and whether it fits", parents=parents
    )
    # An orchestrator passes the line as text, because a cluster has no copy of the checkout that submits it.
    line = verb.add_mutually_exclusive_group(required=True)
    line.add_argument("config", type=Path, nargs="?", help="the line's YAML file")
    line.add_argument("--document", metavar="TEXT", help="the line itself, as YAML or JSON text")
    verb.add_argument(
        "--resume", metavar="RUN", help="check the plan of this run instead of making one; empty: make one"
    )
    verb.add_argument(
        "--set-json", type=json_list, default=[], metavar="LIST", help="like --set, but all changes as one JSON list"
    )
    _add_started_by(verb)
    verb.add_argument("--uri-to", type=Path, metavar="FILE", help="write the plan's URI there")
    verb.add_argument(
        "--memory-to",
        nargs=3,
        action="append",
        default=[],
        metavar=("STEP", "MAX_GIB", "FILE"),
        help="write the memory that the step's pod needs to FILE, as a Kubernetes quantity; MAX_GIB if not estimated",
    )
    verb.add_argument("--gpu", metavar="NAME", help="estimate memory, time and cost for this card, e.g. h100")
    verb.add_argument("--memory", action="store_true", help="also print what the memory consists of")
    verb.set_defaults(run=_plan)

    parents = [options.stored, options.settings]
    verb = verbs.add_parser("run", help="run the whole pipeline here, each step as a subprocess", parents=parents)
    verb.add_argument("config", type=Path, nargs="?", help="the line's YAML file")
    verb.add_argument("--plan", metavar="URI", help="finish this plan instead of making one")
    _add_started_by(verb)
    verb.add_argument(
        "--until", choices=[step.name for step in graph.STEPS], metavar="STEP", help="stop after this step"
    )
    verb.set_defaults(run=_run)

    parents = [options.stored, options.orchestrator]
    verb = verbs.add_parser("status", help="print the state of a run", parents=parents)
    run = verb.add_mutually_exclusive_group(required=True)
    run.add_argument("run_id", metavar="RUN", nargs="?", help="the run's id, or latest")
    run.add_argument(
        "--document", metavar="TEXT", help="the line itself, as YAML or JSON text; its run is that of --orchestrator-id"
    )
    verb.add_argument("--resume", metavar="RUN", help="a run of the store, used instead of any other that is named")
    verb.add_argument("--page", type=Path, metavar="FILE", help="write the state as an HTML page there")
    verb.set_defaults(run=_status)


def _add_started_by(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--started-by",
        choices=("hand", "schedule"),
        default="hand",
        help="schedule: the run needs schedule.min_new_rows new rows; hand (default): any number is enough",
    )


def _graph(args: argparse.Namespace) -> int:
    print(graph_text.as_mermaid() if args.format == "mermaid" else graph_text.as_text())
    return 0


def _check(args: argparse.Namespace) -> int:
    from qlora_retrain.config import platform, schedule
    from qlora_retrain.config.line import load
    from qlora_retrain.runtimes import data_preview

    # Raises `UsageError` with every error of the file at once.
    config = load(args.config, args.set)
    print(f"{args.config}: line {config.line} is valid")
    if args.config.name != f"{config.line}.yaml":
        print(f"Airflow runs a line from the file that is named after it: {config.line}.yaml, not {args.config.name}")
    print(platform.load(args.config.parent).describe(config.line))
    if config.schedule is not None:
        for sentence in schedule.describe(config.schedule, datetime.now(UTC)):
            print(sentence)
    # Flushed, so that it stands before the output of the program that reads the data.
    sys.stdout.flush()
    return data_preview.check(config) if args.data else 0


def _preview(args: argparse.Namespace) -> int:
    from qlora_retrain.config.line import load
    from qlora_retrain.runtimes import data_preview

    return data_preview.preview(load(args.config, args.set), args.rows)


def _plan(args: argparse.Namespace) -> int:
    from qlora_retrain.config import gpus, platform
    from qlora_retrain.pipeline import explain, forecast_text, kfp_outputs, make_plan, status

    if args.gpu is not None:
        gpus.find_card(args.gpu, platform.load().gpus)  # before anything is written
    # A person writes --set; an orchestrator fills a list parameter in as one --set-json.
    overrides = [*args.set, *args.set_json]
    if args.resume:
        plan = _find_plan_of_line(args, overrides)
    else:
        plan = make_plan.make_plan(
            _line(args),
            store_root(args),
            overrides=overrides,
            orchestrator=args.orchestrator_id,
            is_started_by_schedule=args.started_by == "schedule",
        )

    text = explain.as_text(plan)
    if not status.nothing_to_do(plan):
        text += f"\n{forecast_text.as_text(plan, gpu=args.gpu, has_parts=args.memory)}"
    print(text)
    # KFP shows Markdown; the fences keep the columns of the table aligned.
    if args.report_to is not None:
        kfp_outputs.write_file(args.report_to, f"```\n{text}\n```\n")
    if args.uri_to is not None:
        kfp_outputs.write_file(args.uri_to, plan.uri)
    if args.memory_to:
        _write_memory(plan, args.memory_to)
    return 0


def _write_memory(plan: Plan, requests: list[list[str]]) -> None:
    """Write the memory of steps' pods; each request is a step, the most GiB that its pod may get, and a file."""
    from qlora_retrain.config.cluster_profile import quantity
    from qlora_retrain.pipeline import kfp_outputs, pod_sizes
    from qlora_retrain.pipeline.forecast import NotEstimated

    try:
        sizes = pod_sizes.planned_sizes(plan)
    except NotEstimated as reason:
        print(f"the pods' memory is not estimated, so they get the most that they may: {reason}")
        sizes = {}
    for step, text, path in requests:
        max_gib = float(text)
        memory_gib = min(sizes[step].memory_gib, max_gib) if sizes else max_gib
        kfp_outputs.write_file(Path(path), quantity(memory_gib))


def _line(args: argparse.Namespace) -> Path | str:
    """Return the line: a file, or the document itself."""
    line: Path | str = args.config or args.document
    return line


def _find_plan_of_line(args: argparse.Namespace, overrides: list[str]) -> Plan:
    """Return the plan of another run of the store, and check that it is one of this line.

    Raises:
        UsageError: If it is a plan of another line, or if there are overrides, too.
    """
    from qlora_retrain.config.line import load
    from qlora_retrain.pipeline import make_plan
    from qlora_retrain.storage import open_store

    # A plan is a lock file: changed settings would have other keys.
    if overrides:
        names = ", ".join(map(uris.mask_secrets, overrides))
        raise UsageError(f"--resume with {names}: a plan's settings are fixed; leave out --resume to change settings")
    line, plan = load(_line(args)).line, make_plan.find_plan(open_store(store_root(args)), args.resume)
    if plan.line != line:
        raise UsageError(f"run {plan.run_id} belongs to line {plan.line}; expected a run of line {line}")
    return plan


def _run(args: argparse.Namespace) -> int:
    from qlora_retrain.config import platform
    from qlora_retrain.pipeline import explain, make_plan, plan_hold, status
    from qlora_retrain.pipeline.plan import Plan
    from qlora_retrain.runtimes import local
    from qlora_retrain.storage import open_store

    if args.plan is not None:
        plan = Plan.load(args.plan)
        plan_hold.hold(open_store(plan.root), plan)
    elif args.config is not None:
        by_schedule = args.started_by == "schedule"
        plan = make_plan.make_plan(
            args.config, store_root(args), overrides=args.set, is_started_by_schedule=by_schedule
        )
    else:
        raise UsageError("run: expected a CONFIG, or --plan URI to finish another run's plan")

    # Flushed, so that the plan stands before the output of the steps.
    print(explain.as_text(plan), flush=True)
    # The text says why: the same recipe made the version in production, or too few rows are new.
    if status.nothing_to_do(plan):
        return 0
    code = local.run(plan, args.until, max_step_hours=platform.load().runtime_of(plan.line).max_step_hours)
    if code == 0:
        print(explain.status_text(plan))
        if args.until:
            command = f"qlora-retrain run --plan {shlex.quote(plan.uri)}"
            print(f"stopped after {args.until}, as --until says; go on with: {command}")
    return code


def _status(args: argparse.Namespace) -> int:
    from qlora_retrain.pipeline import explain, kfp_outputs, run_page
    from qlora_retrain.pipeline.plan import Plan

    uri = _plan_uri_of_run(args)
    # KFP's exit handler runs whatever happened, also when the plan task failed.
    if uri is None:
        text = page = report = "The run ended before it had a plan; the log of its first task says why."
    else:
        plan = Plan.read(uri)
        text, page, report = explain.status_text(plan), run_page.page(plan), run_page.decisive_page(plan)

    print(text)
    if args.page is not None:
        kfp_outputs.write_file(args.page, page)
    if args.report_to is not None:
        kfp_outputs.write_file(args.report_to, report)
    return 0


def _plan_uri_of_run(args: argparse.Namespace) -> str | None:
    """Return the URI of the run's plan; None where the run of an orchestrator ended before it had one.

    Raises:
        UsageError: If the store has no runs, and the latest is asked for.
    """
    from qlora_retrain.config.line import load
    from qlora_retrain.pipeline.make_plan import find_run
    from qlora_retrain.pipeline.plan import plan_uri
    from qlora_retrain.storage import open_store

    store = open_store(store_root(args))
    run = args.resume or args.run_id

    # An orchestrator knows the run by ids of its own; a person gives the run's id in the store.
    if args.document is not None and not args.resume:
        run = find_run(store, load(args.document).line, args.orchestrator_id)
        return plan_uri(store.uri, run) if run else None
    if run == "latest":
        # A run whose plan could not be made has only the ending that says why.
        runs = sorted(store.children("runs"), reverse=True)
        run = next((run for run in runs if "plan.json" in store.children(f"runs/{run}")), None)
        if run is None:
            raise UsageError(f"{store.uri}: the store has no runs yet")
    return plan_uri(store.uri, run)
