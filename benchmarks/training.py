"""How fast and how lean `train_qlora` is, beside what people would otherwise write, on the same work.

Contestants, all over the same rows in the same order (ours: rows of like length in one step), with the same rank,
layers, dropout, learning rate, batch and number of steps:

    ours           the step as it ships, over the 4-bit base
    ours, lean     the same with gradient checkpointing, as TRL has it by default
    ours, 16 bits  the same trainer over the original 16-bit base (plain LoRA)
    trainer        transformers' Trainer with PEFT and full logits
    trl            TRL's SFTTrainer as it comes
    trl, tuned     the same with eager attention and without gradient checkpointing: its best settings on a CPU

Each runs in a process of its own, in turn, round after round; the first steps of each are not counted. Prints medians
of tokens a second (padding not counted), of supervised tokens a second, of peak resident memory (of all processes of
the step), and the ratio to ours round by round, by the clock and by CPU seconds, which others on the machine change
less. With `--dropout 0` it also compares the losses of every step.

Commands, where FOLDER holds BANKING77's train.csv and test.csv, and `make bench-setup` has fetched TRL:

    python benchmarks/training.py --data FOLDER [--dropout 0.05] [--sweep length|rank|batch]
    python benchmarks/training.py --data FOLDER --seeds 3     what was learnt: the loss of 200 held-out rows after the
                                                              same rows; order, start and dropout differ by seed
    python benchmarks/training.py --data FOLDER --profile     where the time of our step goes, and what its products
                                                              alone would take at the speed that large ones have here
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import training_contestants as contestants

PROJECT = Path(__file__).resolve().parents[1]
PEERS = PROJECT / ".state" / "bench"
BASE = PROJECT / ".state" / "base" / "smollm2-135m-instruct"
CONTESTANTS = ("ours", "ours, lean", "ours, 16 bits", "trainer", "trl", "trl, tuned")
UNCOUNTED_STEPS = 2
SWEEPS = {"length": (128, 256, 512, 1024, 2048), "rank": (4, 8, 16, 32, 64), "batch": (1, 2, 4, 8, 16)}
HELD_OUT, HELD_OUT_ROWS = "held_out.json", 200
SYSTEM = "Name the intent of the customer's message."


def main() -> None:
    """Prepare the work, run the contestants in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with BANKING77's train.csv")
    parser.add_argument("--base", type=Path, default=BASE, help="the 16-bit model")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--length", type=int, help="tokens of every row; chats are strung together")
    parser.add_argument("--sweep", choices=sorted(SWEEPS))
    parser.add_argument("--seeds", type=int, help="compare the loss of held-out rows over so many seeds")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "bench-work")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measured(options)))
        return
    prepare_base(options)
    if options.profile:
        prepare_rows(options)
        profile(options)
        return
    if options.seeds:
        learnt(options)
        return
    for value in SWEEPS[options.sweep] if options.sweep else (None,):
        if value is not None:
            setattr(options, options.sweep, value)
            print(f"{options.sweep} {value}")
        if options.sweep == "length":
            options.batch, options.accumulation = max(1, 2048 // value), 1
        prepare_rows(options)
        table(options, play(options))


def play(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every contestant once a round, each in a process of its own."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            command = [sys.executable, __file__, "--contestant", name]
            for key in ("data", "base", "steps", "dropout", "rank", "batch", "accumulation", "work", "seed"):
                command += [f"--{key}", str(getattr(options, key))]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "src"), str(PEERS)]),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
            }
            done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: ended with {done.returncode}\n{done.stderr[-4000:]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    return runs


def learnt(options: argparse.Namespace) -> None:
    """The loss of held-out rows after training, by contestant and seed."""
    options.rounds = 1
    with (options.data / "test.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    random.Random(0).shuffle(lines)
    (options.work / HELD_OUT).write_text(json.dumps([encoded(options, line) for line in lines[:HELD_OUT_ROWS]]))
    losses: dict[str, list[float]] = {name: [] for name in options.only}
    for seed in range(options.seeds):
        options.seed = seed
        prepare_rows(options)
        for name, found in play(options).items():
            losses[name].append(found[0]["held_out_loss"])
            print(f"seed {seed}  {name:<15}{losses[name][-1]:.4f}", flush=True)
    (options.work / HELD_OUT).unlink()
    print(f"loss of {HELD_OUT_ROWS} held-out rows after {options.steps} steps, dropout {options.dropout}")
    for name, found in losses.items():
        print(f"{name:<15}mean {statistics.mean(found):.4f}  from {min(found):.4f} to {max(found):.4f}")


def table(options: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Medians, and the ratios to ours of the runs of one round."""
    print(
        f"rank {options.rank}, dropout {options.dropout}, batch {options.batch} x {options.accumulation}, "
        f"{options.steps} steps, median of {options.rounds} rounds"
    )
    print(
        f"{'':<15}tokens/s  supervised/s  peak MiB  ours is faster by    in CPU seconds  memory of ours  "
        "worst loss difference"
    )
    ours = runs.get("ours")
    for name, found in runs.items():
        fields = [statistics.median(run[key] for run in found) for key in ("tokens_s", "supervised_s", "rss_mib")]
        line = f"{name:<15}{fields[0]:8.0f}  {fields[1]:12.1f}  {fields[2]:8.0f}"
        if name == "ours":
            line += f"  {statistics.median(run['tokens_cpu_s'] for run in found):.0f} tokens a CPU second"
        if ours and name != "ours":
            faster = [a["tokens_s"] / b["tokens_s"] for a, b in zip(ours, found, strict=True)]
            cheaper = [a["tokens_cpu_s"] / b["tokens_cpu_s"] for a, b in zip(ours, found, strict=True)]
            leaner = statistics.median(a["rss_mib"] / b["rss_mib"] for a, b in zip(ours, found, strict=True))
            apart = max(abs(a / b - 1) for a, b in zip(ours[0]["losses"], found[0]["losses"], strict=True))
            line += f"  {statistics.median(faster):6.2f} ({min(faster):.2f}-{max(faster):.2f})"
            line += f"  {statistics.median(cheaper):6.2f} ({min(cheaper):.2f}-{max(cheaper):.2f})"
            line += f"  {leaner:14.2f}  {apart:20.2%}"
        print(line, flush=True)
    for name, found in runs.items():
        print(f"{name:<15}losses " + " ".join(f"{loss:.3f}" for loss in found[0]["losses"]))


# --- the work, the same for all ---


def prepare_base(options: argparse.Namespace) -> None:
    """The 4-bit form, made by the step that makes it."""
    sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
    folder = options.work / "base_nf4"
    if (folder / "quantization.json").is_file():
        return
    from components.quantize_model.step import run
    from qlora_retrain.config.sections import QuantizeConfig

    folder.mkdir(parents=True, exist_ok=True)
    run(QuantizeConfig(), options.base, folder)


def prepare_rows(options: argparse.Namespace) -> None:
    """Rows as tokens and labels, in the order in which every contestant sees them."""
    from components.train_qlora.rows import Order

    lines = shuffled(options)
    rows: list[dict[str, list[int]]] = []
    wanted = options.steps * options.batch * options.accumulation
    texts = iter(lines * 20)
    while len(rows) < wanted:
        row: dict[str, list[int]] = {"input_ids": [], "labels": []}
        while not row["input_ids"] or (options.length and len(row["input_ids"]) < options.length):
            for name, values in encoded(options, next(texts)).items():
                row[name] += values
        rows.append({name: values[: options.length] for name, values in row.items()})
    order = Order([len(row["input_ids"]) for row in rows], options.batch * options.accumulation, options.seed)
    (options.work / "rows.json").write_text(json.dumps([rows[i] for i in order]))


def shuffled(options: argparse.Namespace) -> list[dict[str, str]]:
    """The lines of BANKING77's train.csv in the seed's order."""
    with (options.data / "train.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    random.Random(options.seed).shuffle(lines)
    return lines


def as_chat(line: dict[str, str]) -> list[dict[str, str]]:
    """A line of BANKING77 as a chat."""
    said = [("system", SYSTEM), ("user", line["text"]), ("assistant", line["category"])]
    return [{"role": role, "content": text} for role, text in said]


def encoded(options: argparse.Namespace, line: dict[str, str]) -> dict[str, list[int]]:
    """A line of BANKING77 as a chat's tokens and labels."""
    from components.train_qlora.rows import IGNORED
    from qlora_retrain.lm import chat

    found = chat.encode(tokenizer_of(options.base), as_chat(line))
    pairs = zip(found.input_ids, found.supervised, strict=True)
    return {"input_ids": found.input_ids, "labels": [token if learn else IGNORED for token, learn in pairs]}


@functools.cache
def tokenizer_of(base: Path) -> Any:
    """The model's tokenizer, loaded once."""
    from qlora_retrain.lm import chat

    return chat.load_tokenizer(base)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Train as one contestant; speed after the first steps, peak memory, the loss of each step."""
    sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
    warnings.filterwarnings("ignore")
    rows = json.loads((options.work / "rows.json").read_text())
    ours = options.contestant.startswith("ours")
    if ours:
        from components.train_qlora import worker

        worker.stay_light()  # as in the process that the step trains in
    trainer = contestants.MAKERS[options.contestant](options, rows)
    found = timed(options, trainer, rows)
    if ours:
        found["rss_mib"] += starter_mib()
    return {**found, "held_out_loss": held_out_loss(options, trainer.model)}


def starter_mib() -> float:
    """What the step holds beside the process that trains: the one that starts it, and multiprocessing's tracker."""
    program = (
        "import multiprocessing, os, psutil, time, components.train_qlora.step\n"
        "if __name__ == '__main__':\n"
        "    trains = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(2,))\n"
        "    trains.start()\n"
        "    me = psutil.Process()\n"
        "    others = [one for one in me.children() if one.pid != trains.pid]\n"
        "    print(sum(one.memory_info().rss for one in [me, *others]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return int(done.stdout) / 2**20


def timed(options: argparse.Namespace, trainer: Any, rows: list[Any]) -> dict[str, Any]:
    """Train; speed after the first steps, peak memory of the process until now, the loss of each step."""
    clock = clock_callback()
    trainer.add_callback(clock)
    trainer.train()
    from components.train_qlora.rows import IGNORED

    a_step = options.batch * options.accumulation
    counted = rows[UNCOUNTED_STEPS * a_step : options.steps * a_step]
    seconds, cpu_seconds = (a - b for a, b in zip(clock.ended[-1], clock.ended[UNCOUNTED_STEPS - 1], strict=True))
    supervised = sum(sum(label != IGNORED for label in row["labels"][1:]) for row in counted)
    return {
        "tokens_s": sum(len(row["input_ids"]) for row in counted) / seconds,
        "tokens_cpu_s": sum(len(row["input_ids"]) for row in counted) / cpu_seconds,
        "supervised_s": supervised / seconds,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def held_out_loss(options: argparse.Namespace, model: Any) -> float | None:
    """Mean loss of the rows that `learnt` set aside, by one function for all contestants."""
    from components.train_qlora.loss import mean_loss
    from components.train_qlora.rows import Rows

    path = options.work / HELD_OUT
    return mean_loss(model, Rows(json.loads(path.read_text())), 2, 16) if path.is_file() else None


def clock_callback() -> Any:
    """A callback that notes when each step ended, by the clock and in CPU seconds."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ended: list[tuple[float, float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ended.append((time.perf_counter(), time.process_time()))

    return Clock()


KINDS = {
    "products of frozen layers and adapters": ("aten::mm", "aten::addmm_", "aten::addmm"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data", "aten::index_select"),
    "unpacking 4 bits": ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise"),
    "random numbers for dropout": ("aten::random_",),
}


def profile(options: argparse.Namespace) -> None:
    """Where the time of a pass over the rows of middle length goes, by kind, against the products' own limit."""
    import torch

    from components.train_qlora import packed
    from components.train_qlora.loss import summed_loss, supervised
    from components.train_qlora.rows import Collate

    rows = json.loads((options.work / "rows.json").read_text())
    trainer = contestants.make_ours(options, rows)
    model = trainer.model.train()
    first = (len(rows) - options.batch) // 2
    batch = Collate(2)(sorted(rows, key=lambda row: len(row["input_ids"]))[first : first + options.batch])
    for _ in range(3):
        begun = time.perf_counter()
        summed_loss(model, batch).backward()
        seconds = time.perf_counter() - begun
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        summed_loss(model, batch).backward()
    events = {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}
    whole, known = sum(events.values()), 0.0
    for kind, names in KINDS.items():
        share = sum(events.get(name, 0.0) for name in names)
        known += share
        print(f"{kind:<40}{share / whole:6.1%}")
    print(f"{'all else (elementwise, copies, Python)':<40}{1 - known / whole:6.1%}")
    line = packed.pack(batch, model.dtype)
    given, computed = int(batch["attention_mask"].sum()), line.input_ids.shape[1]
    frozen = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "lora_A"))
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = model.get_output_embeddings().weight.numel()
    work = computed * (4 * frozen + 6 * adapters) + int(supervised(batch).sum()) * 4 * head  # multiplications and sums
    square = torch.randn(2048, 2048).bfloat16()
    speeds = []
    for _ in range(5):
        begun = time.perf_counter()
        square @ square
        speeds.append(2 * 2048**3 / (time.perf_counter() - begun))
    limit = work / max(speeds)
    print(
        f"{given} tokens in {options.batch} rows, {computed} computed; {seconds:.2f} s, {given / seconds:.0f} tokens/s"
    )
    print(f"{work / 1e9:.0f} GFLOP at {max(speeds) / 1e9:.0f} GFLOP/s: {limit:.2f} s, {given / limit:.0f} tokens/s")


if __name__ == "__main__":
    main()
