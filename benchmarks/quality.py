"""Whether QLoRA is as good as full fine-tuning, on BANKING77: which of 77 things a bank's customer wants.

Contestants, over the same rows in the same order, hence tokens and steps, with the same schedule and loss:

    base           SmolLM2-135M-Instruct as it comes; base, 4 bits: in NF4 with double quantization
    qlora          the step's trainer over the 4-bit base
    lora           the same over the 16-bit base
    full           the same with every weight trained (fp32, products in bf16)

First the learning rates: `lora` (whose rate `qlora` takes too) and `full` are trained for `--choose-steps` steps at a
rate, its half and its double, and on to where the loss on rows of train.csv that nobody is trained on is lowest. Then
each is trained in a process of its own, and ranks the 77 labels for every row of test.csv as `evaluate` does (rows that
train.csv has too are left out; the untrained, for which that is slow, get some of them). Prints the rates, accuracy
with its interval, the paired difference to full fine-tuning, speed and memory.

Command: `python benchmarks/quality.py --data FOLDER [--steps 120]`, with BANKING77's train.csv and test.csv in FOLDER.
What was trained and every scored part is kept in `--work`: the same command goes on where it was stopped. `--only` does
some of the work, so that two cores can share it.
"""

from __future__ import annotations

import argparse
import csv
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

PROJECT = training.PROJECT
CONTESTANTS = ("base", "base, 4 bits", "qlora", "lora", "full")
FIRST_RATES = {"lora": 2e-3, "full": 2e-4}  # where the search for the best begins
CHOOSING_ROWS = 500
UNTRAINED_ROWS = 256
PART = 256  # rows scored between two writes
WITHIN = 0.012  # the claim: 91.3 % against 92.5 % in another routing task
CONFIDENCE = 0.95
SETTINGS = ("steps", "choose_steps", "batch", "accumulation", "rank", "dropout", "seed", "first")


def main() -> None:
    """Choose the rates, train and score each contestant, print the table."""
    sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with BANKING77's train.csv and test.csv")
    parser.add_argument("--base", type=Path, default=training.BASE, help="the 16-bit model")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--choose-steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=10_000, help="so many rows of test.csv; all of them")
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "quality")
    parser.add_argument("--rates", nargs="+", default=[], metavar="NAME=RATE", help="instead of looking for them")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--child", nargs=3, metavar=("NAME", "RATE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.length = None
    if options.child:
        name, rate, folder = options.child
        train_and_score(options, name, float(rate), Path(folder))
        return
    prepare(options)
    given = {name: float(rate) for name, rate in (pair.split("=") for pair in options.rates)}
    for name in options.only:
        of = "lora" if name == "qlora" else name
        rate = given.get(of) or (chosen(options, of) if of in FIRST_RATES else 0.0)
        play(options, name, rate, options.work / name)
    table(options)


def prepare(options: argparse.Namespace) -> None:
    """The 4-bit base and the rows; refuses a folder of other settings."""
    options.work.mkdir(parents=True, exist_ok=True)
    path, now = options.work / "settings.json", {name: getattr(options, name) for name in SETTINGS}
    if path.is_file() and json.loads(path.read_text()) != now:
        sys.exit(f"{options.work}: was made with {path.read_text()}; give another --work, or delete it")
    training.prepare_base(options)
    if not path.is_file():
        training.prepare_rows(options)
        path.write_text(json.dumps(now))


def chosen(options: argparse.Namespace, name: str) -> float:
    """The learning rate with the lowest loss on rows that nobody is trained on, among neighbours of factor 2."""
    losses: dict[float, float] = {}
    best = FIRST_RATES[name]
    while True:
        for rate in sorted({best / 2, best, best * 2} - losses.keys()):
            folder = options.work / f"choose {name} {rate:g}"
            play(options, name, rate, folder)
            losses[rate] = loss_of(read(folder).values())
            print(f"{name} at {rate:g}: loss {losses[rate]:.4f}", flush=True)
        before, best = best, min(losses, key=lambda rate: losses[rate])
        if best == before:
            return best


def loss_of(scores: Iterable[dict[str, Any]]) -> float:
    """In nats a token of the answers."""
    found = list(scores)
    return sum(row["loss_nats"] for row in found) / sum(row["tokens"] for row in found)


def play(options: argparse.Namespace, name: str, rate: float, folder: Path) -> None:
    """Have a process of its own do what is left to do of one contestant."""
    if (folder / "done").is_file():
        return
    command = [sys.executable, __file__, "--child", name, str(rate), str(folder)]
    for key in ("data", "base", "work", *SETTINGS):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if subprocess.run(command, check=False, env=environment).returncode:
        sys.exit(f"{name}: failed; the same command goes on from here")


def train_and_score(options: argparse.Namespace, name: str, rate: float, folder: Path) -> None:
    """Train unless that is done, then score the rows that are not scored yet."""
    warnings.filterwarnings("ignore")
    folder.mkdir(exist_ok=True)
    choosing = folder.name.startswith("choose")
    if not name.startswith("base") and not (folder / "trained.json").is_file():
        options.steps = options.choose_steps if choosing else options.steps
        rows = json.loads((options.work / "rows.json").read_text())
        rows = rows[: options.steps * options.batch * options.accumulation]
        trainer = contestants.make(options, name, rows, rate)
        found = {"rate": rate, **training.timed(options, trainer, rows)}
        found["trained"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        contestants.save(trainer.model, name, folder / "model")
        (folder / "trained.json").write_text(json.dumps(found))
        del trainer
    score(options, contestants.load(options, name, folder / "model"), folder, choosing=choosing)
    (folder / "done").touch()
    if choosing:
        shutil.rmtree(folder / "model")


def score(options: argparse.Namespace, model: Any, folder: Path, *, choosing: bool) -> None:
    """Append the scores of the rows that have none yet to `scores.jsonl`, a part at a time."""
    from qlora_retrain.evaluation import scoring

    rows = held_out_of_train(options) if choosing else test_rows(options)
    rows = rows[:UNTRAINED_ROWS] if folder.name.startswith("base") else rows
    labels = None if choosing else sorted({line["category"] for line in training.shuffled(options)})
    known = read(folder)
    left = [row for row in rows if row.id not in known]
    for start in range(0, len(left), PART):
        part = left[start : start + PART]
        scores = scoring.score_rows(
            model, training.tokenizer_of(options.base), part, labels=labels, batch_tokens=4096,
            last_answer_only=True, what=folder.name, done=len(known) + start, total=len(rows),
        )  # fmt: skip
        with (folder / "scores.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"id": s.id, "loss_nats": s.loss_nats, "tokens": s.tokens, "correct": s.correct}) + "\n"
                for s in scores
            )


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What is scored already, by row."""
    path = folder / "scores.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {row["id"]: row for row in map(json.loads, lines)}


def held_out_of_train(options: argparse.Namespace) -> list[Any]:
    """The last rows of train.csv in the seed's order; the first are trained on."""
    lines = training.shuffled(options)
    trained = options.steps * options.batch * options.accumulation
    if trained + CHOOSING_ROWS > len(lines):
        sys.exit(f"--steps: {trained} rows to train on leave fewer than {CHOOSING_ROWS} of {len(lines)} to choose by")
    return as_rows(lines[-CHOOSING_ROWS:])


def test_rows(options: argparse.Namespace) -> list[Any]:
    """test.csv without what train.csv has."""
    with (options.data / "test.csv").open(encoding="utf-8") as file:
        rows = as_rows(list(csv.DictReader(file)))
    seen = {row.id for row in as_rows(training.shuffled(options))}
    left = [row for row in rows if row.id not in seen]
    random.Random(0).shuffle(left)  # the file is sorted by label
    return left[: options.first]


def as_rows(lines: list[dict[str, str]]) -> list[Any]:
    """Lines as rows to be scored, each prompt once."""
    from qlora_retrain.evaluation.rows import Row
    from qlora_retrain.lm import chat

    chats = [training.as_chat(line) for line in lines]
    return list({row.id: row for row in (Row(chat.row_id(said), "eval", said) for said in chats)}.values())


def table(options: argparse.Namespace) -> None:
    """What was found, and whether QLoRA is within the claim of full fine-tuning."""
    done = [name for name in CONTESTANTS if (options.work / name / "done").is_file()]
    scores = {name: read(options.work / name) for name in done}
    rows = json.loads((options.work / "rows.json").read_text())
    tokens, a_step = sum(len(row["input_ids"]) for row in rows), options.batch * options.accumulation
    print(f"\n{options.steps} steps of {a_step} rows, {tokens} tokens; {len(test_rows(options))} rows of test.csv")
    print(
        f"{'':13}    rate  weights trained   rows  accuracy (95 %)          points to full (95 %)     McNemar p    loss"
        "  tokens/CPU s  peak MiB"
    )
    for name in done:
        print(line_of(options, name, scores))
    if {"qlora", "full"} <= set(done):
        print(answer(against_full("qlora", scores)[0]))


def line_of(options: argparse.Namespace, name: str, scores: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A contestant's line of the table."""
    from qlora_retrain.evaluation import stats

    path = options.work / name / "trained.json"
    trained = json.loads(path.read_text()) if path.is_file() else {}
    found = scores[name].values()
    share = stats.proportion(sum(row["correct"] for row in found), len(found), confidence=CONFIDENCE)
    line = f"{name:13}  {trained['rate']:6g}  {trained['trained']:15,}" if trained else f"{name:13}{'':25}"
    line += f"  {len(found):5}  {share.value:6.1%} ({share.low:.1%} to {share.high:.1%})"
    apart = ""
    if "full" in scores and name != "full":
        between, p = against_full(name, scores)
        ends = f"({100 * between.low:+.2f} to {100 * between.high:+.2f})"
        apart = f"{100 * between.value:+6.2f} {ends:20}  {p:9.2g}"
    line += f"  {apart:38}  {loss_of(found):6.4f}"
    return line + (f"  {trained['tokens_cpu_s']:12.0f}  {trained['rss_mib']:8.0f}" if trained else "")


def against_full(name: str, scores: dict[str, dict[str, dict[str, Any]]]) -> tuple[Any, float]:
    """The difference of the shares of right answers on the rows that both answered, and McNemar's p."""
    from qlora_retrain.evaluation import stats

    both = scores[name].keys() & scores["full"].keys()
    one, other = ([scores[of][i]["correct"] for i in both] for of in (name, "full"))
    return stats.paired_proportions(one, other, confidence=CONFIDENCE), stats.mcnemar(one, other)


def answer(between: Any) -> str:
    """What an interval of QLoRA's accuracy less full fine-tuning's says of the claim."""
    claim = f"QLoRA within {100 * WITHIN:g} points of full fine-tuning: "
    if between.low >= -WITHIN:
        return claim + "yes"
    return claim + ("no" if between.high < -WITHIN else "these rows cannot tell")


if __name__ == "__main__":
    main()
