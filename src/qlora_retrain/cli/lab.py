"""The verb `lab`: train a line with several settings, judge all by the same rows, and say which to take."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

from qlora_retrain.cli.options import Options
from qlora_retrain.core.arguments import store_root
from qlora_retrain.core.errors import UsageError

_MAX_JUDGE_FRACTION = 0.5
_TRIALS = 20


def add_verbs(verbs: Any, options: Options) -> None:
    """Add the verb to a parser's subparsers."""
    verb = verbs.add_parser(
        "lab",
        help="train with several settings, score them on the same rows, and say which to take",
        parents=[options.stored, options.settings],
    )
    verb.add_argument("config", type=Path, help="the line's YAML file")
    verb.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SECTION.KNOB=V1,V2",
        help="train with each of these values; several --vary give all combinations (repeatable)",
    )
    verb.add_argument(
        "--points",
        type=Path,
        metavar="FILE",
        help="train with each of the settings that a YAML file names: {name: {section.knob: value}}",
    )
    verb.add_argument("--seeds", type=_positive, metavar="N", help="train each point with train.seed 0 to N-1")
    verb.add_argument(
        "--skip-impossible", action="store_true", help="leave out combinations that the line refuses, and list them"
    )
    verb.add_argument(
        "--judge-fraction",
        type=_judge_fraction,
        default=0.1,
        metavar="F",
        help="the share of the training prompts that scores the points and is not trained on; default: 0.1",
    )
    verb.add_argument(
        "--parallel", type=_positive, default=1, metavar="N", help="run N points at the same time; default: 1"
    )
    verb.add_argument(
        "--search", choices=["optuna"], help="propose points instead of combining all values; takes ranges, LOW..HIGH"
    )
    verb.add_argument("--trials", type=_positive, metavar="N", help="how many points a search tries; default: 20")
    verb.add_argument("--merge", action="store_true", help="merge every adapter too, and measure what merging costs")
    verb.add_argument("--out", type=Path, metavar="FOLDER", help="where the report is written; default: lab-LINE")
    verb.add_argument("--json", action="store_true", help="print lab.json instead of the recommendation")
    verb.set_defaults(run=_lab)


def _lab(args: argparse.Namespace) -> int:
    from qlora_retrain.lab import experiment, planned, runs, variations
    from qlora_retrain.lab.options import LabOptions

    _refuse_other_mode(args)
    options = LabOptions(
        config=args.config,
        root=store_root(args),
        vary=tuple(map(variations.parse_variation, args.vary)),
        named=variations.read_named(args.points) if args.points else (),
        overrides=tuple(args.set),
        num_seeds=args.seeds,
        skip_impossible=args.skip_impossible,
        judge_fraction=args.judge_fraction,
        parallel=args.parallel,
        has_merge=args.merge,
        out=args.out,
        num_trials=(args.trials or _TRIALS) if args.search else None,
    )
    try:
        document, out = experiment.run(options)
    except runs.Interrupted:
        return 128 + signal.SIGINT
    except planned.NothingMeasured as failure:
        print(f"qlora-retrain: {failure}", file=sys.stderr)
        return failure.code
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        print(document["recommendation"]["sentence"], *document["recommendation"]["notes"], sep="\n")
    if count := len(document["failed"]):
        print(f"{count} run{'s' if count > 1 else ''} did not finish; the report says why", file=sys.stderr)
    print(f"report: {out / 'report.html'}", file=sys.stderr)
    return 0


def _refuse_other_mode(args: argparse.Namespace) -> None:
    """Refuse options that a grid or a search does not have."""
    if args.search and not (args.vary or args.points):
        raise UsageError("--search: nothing to search; add --vary SECTION.KNOB=LOW..HIGH or V1,V2, or --points FILE")
    if args.search and args.seeds:
        raise UsageError(
            "--seeds: a search compares single runs; leave it out, then run the best points with --seeds 3"
        )
    if args.trials and not args.search:
        raise UsageError("--trials: is for a search; add --search optuna, or leave it out")


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return value


def _judge_fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= _MAX_JUDGE_FRACTION:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 0.5, found {text!r}")
    return value
