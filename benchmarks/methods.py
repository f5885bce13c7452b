"""Train BANKING77 by every method and over every base format, as `qlora-retrain lab` does, and compare them.

The points are those of `methods.yaml`: the same rows in the same order, the same steps, batch and schedule. Each run is
an ordinary run of a line, in a store below `--work`; a tenth of the training prompts judges. What a run measured is one
file below `--work`, with its commit, date and machine, so the same command goes on where it was stopped, also after the
code has changed; delete the file, and that run is made again.

    python benchmarks/methods.py --data FOLDER                                  all points, with one seed
    python benchmarks/methods.py --data FOLDER --only lora full --seeds 3       more seeds of some
    python benchmarks/methods.py --data FOLDER --only lora dora --merge         also what merging them costs
    python benchmarks/methods.py --data FOLDER --choose lora+ --rates 5e-4 1e-3 2e-3
    python benchmarks/methods.py --data FOLDER --speed                          alone on a quiet machine: tokens/s
    python benchmarks/methods.py --data FOLDER --ranks qdylora                  its first 2, 4 and 8 ranks
    python benchmarks/methods.py --data FOLDER --table                          the table of what was measured

`--data` is a folder with BANKING77's train.csv, `--base` another model than SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import methods_ranks
import methods_table
from training import BASE, PROJECT

sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
LINE, POINTS = PROJECT / "benchmarks" / "banking77.yaml", PROJECT / "benchmarks" / "methods.yaml"
REFERENCE = PROJECT / "pipelines" / "demo" / "reference.jsonl"
JUDGE_FRACTION = 0.1
CHOOSE_STEPS, SPEED_STEPS = 30, 6
# Only what merging costs is asked for, and no form is chosen that forgets less.
MERGE = ("merge.strength=full", "merge.rank=full")


@dataclass(frozen=True)
class Run:
    """A point with a seed, and the steps that it trains."""

    name: str
    settings: tuple[tuple[str, Any], ...]
    seed: int
    steps: int

    def path(self, work: Path, kind: str) -> Path:
        """Return the file of what was measured."""
        words = re.sub(r"[^a-z0-9+]+", "-", self.name)
        rate = dict(self.settings)["train.learning_rate"]
        suffix = f"-{rate:g}" if kind == "choose" else ""
        return work / kind / f"{words}-{self.seed}{suffix}.json"


def main() -> None:
    """Make the runs that are asked for and missing, and print the table."""
    from qlora_retrain.lab import variations

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with BANKING77's train.csv")
    parser.add_argument("--base", type=Path, default=BASE, help="the 16-bit model")
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "methods")
    parser.add_argument("--points", type=Path, default=POINTS)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--merge", action="store_true", help="measure what merging costs too, with the first seed")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--choose", nargs="+", metavar="NAME", help="print the loss of each rate after 30 steps")
    parser.add_argument("--rates", nargs="+", type=float, default=[])
    parser.add_argument("--speed", action="store_true", help="measure tokens/s alone, in a few steps of each point")
    parser.add_argument("--ranks", metavar="NAME", help="score the adapter of a point with its first ranks alone")
    parser.add_argument("--table", action="store_true", help="print the table of what was measured, and run nothing")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    points = {named.name: named.settings for named in variations.read_named(options.points)}
    if unknown := set(options.only or options.choose or ()) - set(points):
        sys.exit(f"{', '.join(sorted(unknown))}: not in {options.points.name}, which has {', '.join(points)}")
    if options.choose:
        choose_rates(options, {name: points[name] for name in options.choose})
        return
    selected = {name: points[name] for name in options.only or points}
    if options.speed:
        for name, settings in selected.items():
            measure(options, Run(name, settings, 0, SPEED_STEPS), "speed")
    elif options.ranks:
        measure_ranks(options, options.ranks)
    elif not options.table:
        for seed in range(options.seeds):
            for name, settings in selected.items():
                measure(options, Run(name, settings, seed, options.steps), "runs")
    print(methods_table.render(list(read_results(options.work, "runs")), list(read_results(options.work, "speed"))))


def choose_rates(options: argparse.Namespace, points: dict[str, Any]) -> None:
    """Print the loss on the rows that judge, for each point and rate."""
    for name, settings in points.items():
        for rate in options.rates:
            changed = tuple({**dict(settings), "train.learning_rate": rate}.items())
            result = measure(options, Run(name, changed, 0, CHOOSE_STEPS), "choose")
            print(f"{name} at {rate:g}: loss {result['numbers']['eval_loss']:.4f}", flush=True)


def measure(options: argparse.Namespace, run: Run, kind: str) -> dict[str, Any]:
    """Make a run unless its file is there, and return what it measured."""
    from qlora_retrain.core import graph
    from qlora_retrain.lab.grid import NamedSettings, Point
    from qlora_retrain.lab.plans import LabPlanner
    from qlora_retrain.lab.runs import Job, run_jobs

    path, merges = run.path(options.work, kind), options.merge and kind == "runs" and is_merged(run)
    if path.is_file():
        result: dict[str, Any] = json.loads(path.read_text())
        if not merges or result["numbers"]["merge_loss_nats"] is not None:
            return result
    path.parent.mkdir(exist_ok=True)
    print(f"{datetime.now(UTC):%H:%M} {run.name}, seed {run.seed}", file=sys.stderr, flush=True)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path[:2])}

    store, now = (options.work / "store").resolve().as_uri(), datetime.now(UTC)
    planner = LabPlanner.for_line(LINE, store, line_settings(options, run), JUDGE_FRACTION, now)
    point = Point((), None, NamedSettings(run.name, run.settings))
    [plan] = planner.write([planner.plan(planner.resolve(point))])
    last = graph.producer_name("adapter" if kind != "runs" else "model" if merges else "evaluation")
    [outcome] = run_jobs([Job(run.name, plan, last, counts_refusal=True)], 1, options.work / "logs")
    if outcome.code:
        sys.exit(f"{run.name}: {outcome.message} ({outcome.code}); the same command goes on from here")

    result = {**result_of(point, plan, kind), "name": run.name, "seed": run.seed, "steps": run.steps}
    path.write_text(json.dumps(result))
    return result


def measure_ranks(options: argparse.Namespace, name: str) -> None:
    """Score the adapters of a point, of every seed that was trained, with their first ranks."""
    results = list(read_results(options.work, "runs"))
    for whole in [result for result in results if result["name"] == name]:
        done = {result["name"] for result in results if result["seed"] == whole["seed"]}
        for result in methods_ranks.cut_results(options.work / "store", whole, done):
            run = Run(result["name"], tuple(result["settings"].items()), result["seed"], result["steps"])
            run.path(options.work, "runs").write_text(json.dumps(result))


def is_merged(run: Run) -> bool:
    """Return whether it is measured what merging costs: of the first seed, where the method merges."""
    return run.seed == 0 and methods_table.is_mergeable(run.settings)


def line_settings(options: argparse.Namespace, run: Run) -> list[str]:
    """Return what the line has otherwise than its file."""
    return [
        f"sources.raw_data.uri={options.data.resolve()}",
        f"sources.base_model={options.base.resolve()}",
        f"sources.reference_data={REFERENCE}",
        f"train.max_steps={run.steps}",
        f"train.seed={run.seed}",
        *MERGE,
        "train.global_batch_size=16",
        "train.micro_batch_size=16",
        # The same arithmetic everywhere, and the faster one on a CPU without matrix instructions for bf16.
        "train.precision=float32",
        # Only the points are compared here: not answers that end by themselves, training rows, or the base without an
        # adapter, which takes longer to score than all points' rows.
        "evaluate.stop_rows=0",
        "evaluate.train_rows=0",
        "evaluate.min_prompts=1",
        "evaluate.base_rows=1",
        "publish.promote_to=null",
    ]


def result_of(point: Any, plan: Any, kind: str) -> dict[str, Any]:
    """Return what a run measured: the numbers of training alone, or all with the score of each row."""
    from qlora_retrain.config.evaluate import EvaluateConfig
    from qlora_retrain.lab.results import read_result
    from qlora_retrain.pipeline import status

    manifests = {name: status.find_manifest(plan, name) for name in ("quantize_model", "train_qlora")}
    facts = {
        "settings": dict(point.all_settings),
        "quantization": manifests["quantize_model"].numbers,
        "numbers": manifests["train_qlora"].numbers,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": git("rev-parse", "--short", "HEAD"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if kind != "runs":
        return facts
    scores = read_result(point, plan, EvaluateConfig())
    rows = {row.id: [row.correct, row.loss_nats, row.tokens, row.prompt] for row in scores.scores}
    return {**facts, "numbers": scores.numbers, "rows": rows}


def git(*words: str) -> str:
    """Return what git says."""
    return subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=False).stdout.strip()


def read_results(work: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Read what was measured, in the order of the files' names."""
    for path in sorted((work / kind).glob("*.json")):
        yield json.loads(path.read_text())


if __name__ == "__main__":
    main()
