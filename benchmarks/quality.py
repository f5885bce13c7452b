"""Compare QLoRA with full fine-tuning on BANKING77, which asks for one of 77 intents of a bank's customers.

The contestants train on the same rows in the same order, so with the same tokens, steps, schedule and loss:

    base           SmolLM2-135M-Instruct without training.
    base, 4 bits   The same in NF4 with double quantization.
    qlora          The step's trainer over the 4-bit base.
    lora           The same over the 16-bit base.
    full           The same with every weight trained (fp32, products in bf16).

First the learning rates are chosen. `lora` and `full` train for `--choose-steps` steps at a rate, its half and its
double. The search continues until the loss on rows of train.csv that no contestant trains on is lowest. `qlora` takes
the rate of `lora`.

Then each contestant trains in a process of its own, and ranks the 77 labels for every row of test.csv as `evaluate`
does. Rows that train.csv has too are left out. The untrained contestants, which are slow to score, get 256 rows. The
result is printed: the rates, accuracy with its interval, the paired difference to full fine-tuning, speed and memory.

Command: `python benchmarks/quality.py --data FOLDER [--steps 120]`, with BANKING77's train.csv and test.csv in FOLDER.
`--work` holds the trained models and every part that was scored, so the same command continues where it was stopped.
`--only` does some of the work, so that two cores can share it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import quality_contestants as contestants
import training

from qlora_retrain.core import json_lines

PROJECT = training.PROJECT
CONTESTANTS = ("base", "base, 4 bits", "qlora", "lora", "full")
FIRST_RATES = {"lora": 2e-3, "full": 2e-4}  # where the search for the best rate begins
SELECTION_ROWS = 500
UNTRAINED_ROWS = 256
ROWS_PER_WRITE = 256
MARGIN = 0.012  # the claim to check: 91.3 % against 92.5 % in another routing task
CONFIDENCE = 0.95
Scores = dict[str, dict[str, Any]]  # by row id: the fields of a line of scores.jsonl
SETTINGS = ("steps", "choose_steps", "micro_batch_size", "gradient_accumulation", "rank", "dropout", "seed", "first")


def main() -> None:
    """Choose the rates, train and score each contestant, print the table."""
    sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with BANKING77's train.csv and test.csv")
    parser.add_argument("--base", type=Path, default=training.BASE, help="the 16-bit model")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--choose-steps", type=int, default=30)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--gradient-accumulation", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=10_000, help="the number of rows of test.csv; default: all")
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "quality")
    parser.add_argument("--rates", nargs="+", default=[], metavar="NAME=RATE", help="do not search for the rates")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--child", nargs=3, metavar=("NAME", "RATE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.row_tokens = None

    # A child process trains and scores one contestant, so that its peak memory is its own.
    if options.child:
        name, rate, folder = options.child
        train_and_score(options, name, float(rate), Path(folder))
        return

    prepare(options)
    fixed_rates = {name: float(rate) for name, rate in (pair.split("=") for pair in options.rates)}
    for name in options.only:
        rate_name = "lora" if name == "qlora" else name
        rate = fixed_rates.get(rate_name) or (choose_rate(options, rate_name) if rate_name in FIRST_RATES else 0.0)
        run_in_process(options, name, rate, options.work / name)
    print_table(options)


def prepare(options: argparse.Namespace) -> None:
    """Make the 4-bit base and the rows; refuse a folder that was made with other settings."""
    options.work.mkdir(parents=True, exist_ok=True)
    path, settings = options.work / "settings.json", {name: getattr(options, name) for name in SETTINGS}
    if path.is_file() and json.loads(path.read_text()) != settings:
        sys.exit(f"{options.work}: was made with the settings {path.read_text()}; name another --work, or delete it")
    training.prepare_base(options)
    if not path.is_file():
        training.prepare_rows(options)
        path.write_text(json.dumps(settings))


def choose_rate(options: argparse.Namespace, name: str) -> float:
    """Find the learning rate with the lowest loss on rows that no contestant trains on, in factors of 2."""
    losses: dict[float, float] = {}
    best = FIRST_RATES[name]
    while True:
        for rate in sorted({best / 2, best, best * 2} - losses.keys()):
            folder = options.work / f"choose {name} {rate:g}"
            run_in_process(options, name, rate, folder)
            losses[rate] = mean_loss(read_scores(folder).values())
            print(f"{name} at {rate:g}: loss {losses[rate]:.4f}", flush=True)

        # Both neighbours of the best rate have been tried when it stays the best.
        previous, best = best, min(losses, key=lambda rate: losses[rate])
        if best == previous:
            return best


def mean_loss(scores: Iterable[dict[str, Any]]) -> float:
    """Return the loss in nats per token of the answers."""
    rows = list(scores)
    return sum(row["loss_nats"] for row in rows) / sum(row["tokens"] for row in rows)


def run_in_process(options: argparse.Namespace, name: str, rate: float, folder: Path) -> None:
    """Do the remaining work of one contestant in a process of its own."""
    if (folder / "done").is_file():
        return
    command = [sys.executable, __file__, "--child", name, str(rate), str(folder)]
    for key in ("data", "base", "work", *SETTINGS):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    # Offline: everything is in local folders, and the tokenizer's threads would disturb the measured CPU time.
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if subprocess.run(command, check=False, env=environment).returncode:
        sys.exit(f"{name}: the process failed; the same command continues from here")


def train_and_score(options: argparse.Namespace, name: str, rate: float, folder: Path) -> None:
    """Train unless that is done, then score the rows that have no score yet."""
    warnings.filterwarnings("ignore")
    folder.mkdir(exist_ok=True)
    is_selection = folder.name.startswith("choose")

    if not name.startswith("base") and not (folder / "trained.json").is_file():
        options.steps = options.choose_steps if is_selection else options.steps
        rows = json.loads((options.work / "rows.json").read_text())
        rows = rows[: options.steps * options.micro_batch_size * options.gradient_accumulation]
        trainer = contestants.make_trainer(options, name, rows, rate)
        measurements = {"rate": rate, **training.train_and_time(options, trainer, rows)}
        measurements["trained"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        contestants.save(trainer.model, name, folder / "model")
        (folder / "trained.json").write_text(json.dumps(measurements))
        del trainer

    # The trainer is released before, so that its memory does not add to that of scoring.
    model = contestants.load(options, name, folder / "model")
    score_missing_rows(options, model, folder, is_selection=is_selection)
    (folder / "done").touch()
    # A run that only chose a rate is never loaded again, and a full model takes 270 MB.
    if is_selection:
        shutil.rmtree(folder / "model")


def score_missing_rows(options: argparse.Namespace, model: Any, folder: Path, *, is_selection: bool) -> None:
    """Append the scores of the rows that have none yet to `scores.jsonl`, some rows at a time."""
    from qlora_retrain.evaluation import scoring

    rows = selection_rows(options) if is_selection else test_rows(options)
    rows = rows[:UNTRAINED_ROWS] if folder.name.startswith("base") else rows
    # Rates are chosen by loss, which needs no ranking of 77 labels.
    labels = None if is_selection else sorted({line["category"] for line in training.shuffled_lines(options)})
    scored_ids = read_scores(folder)
    missing = [row for row in rows if row.id not in scored_ids]

    for start in range(0, len(missing), ROWS_PER_WRITE):
        part = missing[start : start + ROWS_PER_WRITE]
        scores = scoring.score_rows(
            model, training.load_tokenizer(options.base), part, labels=labels, batch_tokens=4096,
            last_answer_only=True, description=folder.name, done=len(scored_ids) + start, total=len(rows),
        )  # fmt: skip
        with (folder / "scores.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"id": s.id, "loss_nats": s.loss_nats, "tokens": s.tokens, "correct": s.correct}) + "\n"
                for s in scores
            )


def read_scores(folder: Path) -> Scores:
    """Read the scores that are there already."""
    path = folder / "scores.jsonl"
    return {row["id"]: row for _, row in json_lines.read(path)} if path.is_file() else {}


def selection_rows(options: argparse.Namespace) -> list[Any]:
    """Return the last rows of train.csv in the seed's order; the contestants train on the first ones."""
    lines = training.shuffled_lines(options)
    trained = options.steps * options.micro_batch_size * options.gradient_accumulation
    if trained + SELECTION_ROWS > len(lines):
        sys.exit(
            f"--steps: training on {trained} of {len(lines)} rows leaves fewer than the {SELECTION_ROWS} rows that "
            "choose the rate; use fewer steps"
        )
    return as_rows(lines[-SELECTION_ROWS:])


def test_rows(options: argparse.Namespace) -> list[Any]:
    """Return the rows of test.csv that train.csv does not have."""
    with (options.data / "test.csv").open(encoding="utf-8") as file:
        rows = as_rows(list(csv.DictReader(file)))
    train_ids = {row.id for row in as_rows(training.shuffled_lines(options))}
    unique = [row for row in rows if row.id not in train_ids]
    random.Random(0).shuffle(unique)  # the file is sorted by label
    return unique[: options.first]


def as_rows(lines: list[dict[str, str]]) -> list[Any]:
    """Convert lines to rows for scoring, each prompt once."""
    from qlora_retrain.evaluation.rows import Row
    from qlora_retrain.lm import conversations

    # By the canonical prompt, so that a question of test.csv is not one of train.csv in other letters.
    rows: dict[str, Any] = {}
    for messages in map(training.as_chat, lines):
        prompt = conversations.normalized_text(conversations.prompt_of(messages))
        row_id = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        rows[row_id] = Row(row_id, "eval", messages)
    return list(rows.values())


def print_table(options: argparse.Namespace) -> None:
    """Print the results, and whether QLoRA is within the margin of full fine-tuning."""
    finished = [name for name in CONTESTANTS if (options.work / name / "done").is_file()]
    scores = {name: read_scores(options.work / name) for name in finished}
    rows = json.loads((options.work / "rows.json").read_text())
    tokens = sum(len(row["input_ids"]) for row in rows)
    batch_size = options.micro_batch_size * options.gradient_accumulation

    print(f"\n{options.steps} steps of {batch_size} rows, {tokens} tokens; {len(test_rows(options))} rows of test.csv")
    print(
        f"{'':13}    rate  weights trained   rows  accuracy (95 %)          points to full (95 %)     McNemar p    loss"
        "  tokens/CPU s  peak MiB"
    )
    for name in finished:
        print(format_table_row(options, name, scores))
    if {"qlora", "full"} <= set(finished):
        print(answer_claim(compare_with_full("qlora", scores)[0]))


def format_table_row(options: argparse.Namespace, name: str, scores: dict[str, Scores]) -> str:
    """Write a contestant's row of the table."""
    from qlora_retrain.evaluation import stats

    path = options.work / name / "trained.json"
    trained = json.loads(path.read_text()) if path.is_file() else {}
    rows = scores[name].values()
    share = stats.proportion_interval(sum(row["correct"] for row in rows), len(rows), confidence=CONFIDENCE)
    line = f"{name:13}  {trained['rate']:6g}  {trained['trained']:15,}" if trained else f"{name:13}{'':25}"
    line += f"  {len(rows):5}  {share.value:6.1%} ({share.low:.1%} to {share.high:.1%})"

    comparison = ""
    if "full" in scores and name != "full":
        difference, p = compare_with_full(name, scores)
        ends = f"({100 * difference.low:+.2f} to {100 * difference.high:+.2f})"
        comparison = f"{100 * difference.value:+6.2f} {ends:20}  {p:9.2g}"
    line += f"  {comparison:38}  {mean_loss(rows):6.4f}"
    return line + (f"  {trained['tokens_per_cpu_second']:12.0f}  {trained['peak_rss_mib']:8.0f}" if trained else "")


def compare_with_full(name: str, scores: dict[str, Scores]) -> tuple[Any, float]:
    """Return the difference of the accuracies on the rows that both answered, and McNemar's p-value."""
    from qlora_retrain.evaluation import stats

    # The untrained contestants were scored on some of the rows only.
    common_ids = scores[name].keys() & scores["full"].keys()
    ours, theirs = ([scores[contestant][i]["correct"] for i in common_ids] for contestant in (name, "full"))
    return stats.paired_proportion_interval(ours, theirs, confidence=CONFIDENCE), stats.mcnemar_p_value(ours, theirs)


def answer_claim(difference: Any) -> str:
    """Say whether the interval of QLoRA's accuracy minus full fine-tuning's supports the claim."""
    claim = f"QLoRA within {100 * MARGIN:g} points of full fine-tuning: "
    if difference.low >= -MARGIN:
        return claim + "yes"
    return claim + ("no" if difference.high < -MARGIN else "these rows cannot tell")


if __name__ == "__main__":
    main()
