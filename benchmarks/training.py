"""Compare the speed and the memory of `train_qlora` with the usual alternatives, on the same work.

All contestants train on the same rows in the same order (that of our sampler), with the same rank, layers, dropout,
learning rate, batch size and number of steps:

    ours                 The step as it ships, over the 4-bit base.
    ours, checkpointing  The same with gradient checkpointing, which is TRL's default.
    ours, 16 bits        The same trainer over the original 16-bit base (plain LoRA).
    trainer              transformers' Trainer with PEFT and full logits.
    trl                  TRL's SFTTrainer with its defaults.
    trl, tuned           TRL with eager attention and no gradient checkpointing: its best settings on a CPU.

Each runs in a process of its own, in turn, round after round; the first steps of each are not counted. The table has
medians of tokens per second (without padding), of supervised tokens per second, and of peak resident memory (of all
processes of the step). It also has the ratios to ours within each round, by wall time and by CPU seconds; other work on
the machine changes the latter less. With `--dropout 0` the losses of every step can be compared as well.

Commands, where FOLDER holds BANKING77's train.csv and test.csv, and `make bench-setup` has fetched TRL:

    python benchmarks/training.py --data FOLDER [--dropout 0.05] [--sweep row_tokens|rank|micro_batch_size]

To compare the quality: the loss of 200 evaluation rows after the same training. Order, initialization and dropout
differ by seed.

    python benchmarks/training.py --data FOLDER --seeds 3

To profile our step: the time by kind of operation, and the time of its matrix products alone at this machine's best
speed:

    python benchmarks/training.py --data FOLDER --profile
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
PEER_PACKAGES = PROJECT / ".state" / "bench"
BASE = PROJECT / ".state" / "base" / "smollm2-135m-instruct"
CONTESTANTS = ("ours", "ours, checkpointing", "ours, 16 bits", "trainer", "trl", "trl, tuned")
WARMUP_STEPS = 2  # not counted: libraries compile kernels and allocators grow
SWEEPS = {
    "row_tokens": (128, 256, 512, 1024, 2048),
    "rank": (4, 8, 16, 32, 64),
    "micro_batch_size": (1, 2, 4, 8, 16),
}
EVAL_FILE, NUM_EVAL_ROWS = "eval_rows.json", 200
SYSTEM_PROMPT = "Name the intent of the customer's message."


def main() -> None:
    """Prepare the inputs, run the contestants in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with BANKING77's train.csv")
    parser.add_argument("--base", type=Path, default=BASE, help="the 16-bit model")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--gradient-accumulation", type=int, default=2)
    parser.add_argument("--row-tokens", type=int, help="tokens of every row; chats are joined to reach it")
    parser.add_argument("--sweep", choices=sorted(SWEEPS))
    parser.add_argument("--seeds", type=int, help="compare the loss of evaluation rows over this number of seeds")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "bench-work")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()

    # This is the process of one contestant, and its result is the last line of its output.
    if options.contestant:
        print(json.dumps(train_contestant(options)))
        return

    prepare_base(options)
    if options.profile:
        prepare_rows(options)
        profile(options)
        return
    if options.seeds:
        compare_eval_losses(options)
        return

    for value in SWEEPS[options.sweep] if options.sweep else (None,):
        if value is not None:
            setattr(options, options.sweep, value)
            print(f"{options.sweep} {value}")
        # The number of tokens in a step stays the same for every length of rows.
        if options.sweep == "row_tokens":
            options.micro_batch_size, options.gradient_accumulation = max(1, 2048 // value), 1
        prepare_rows(options)
        print_table(options, run_contestants(options))


def run_contestants(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run every contestant once per round, each in a process of its own; return the results by contestant."""
    # Contestants take turns within a round, so that a slow hour of the machine slows all of them.
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            command = [sys.executable, __file__, "--contestant", name]
            for key in (
                "data", "base", "steps", "dropout", "rank", "micro_batch_size", "gradient_accumulation", "work", "seed",
            ):  # fmt: skip
                command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
            # No contestant may download anything, or start threads of a tokenizer, while it is timed.
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "src"), str(PEER_PACKAGES)]),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
            }
            process = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
            if process.returncode:
                sys.exit(f"{name}: ended with exit code {process.returncode}\n{process.stderr[-4000:]}")
            results[name].append(json.loads(process.stdout.splitlines()[-1]))
    return results


def compare_eval_losses(options: argparse.Namespace) -> None:
    """Print the loss of evaluation rows after training, by contestant and seed."""
    # One round: the losses do not depend on how fast the machine is.
    options.rounds = 1
    with (options.data / "test.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    random.Random(0).shuffle(lines)  # the file is sorted by label
    (options.work / EVAL_FILE).write_text(json.dumps([tokenize(options, line) for line in lines[:NUM_EVAL_ROWS]]))

    losses: dict[str, list[float]] = {name: [] for name in options.only}
    for seed in range(options.seeds):
        options.seed = seed
        prepare_rows(options)
        for name, results in run_contestants(options).items():
            losses[name].append(results[0]["eval_loss"])
            print(f"seed {seed}  {name:<20}{losses[name][-1]:.4f}", flush=True)
    (options.work / EVAL_FILE).unlink()

    print(f"loss of {NUM_EVAL_ROWS} evaluation rows after {options.steps} steps, dropout {options.dropout}")
    for name, by_seed in losses.items():
        print(f"{name:<20}mean {statistics.mean(by_seed):.4f}  from {min(by_seed):.4f} to {max(by_seed):.4f}")


def print_table(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print medians, and the ratios to ours within each round."""
    print(
        f"rank {options.rank}, dropout {options.dropout}, "
        f"batch {options.micro_batch_size} x {options.gradient_accumulation}, "
        f"{options.steps} steps, median of {options.rounds} rounds"
    )
    print(
        f"{'':<20}tokens/s  supervised/s  peak MiB  ours is faster by    in CPU seconds  memory of ours  "
        "worst loss difference"
    )
    ours = results.get("ours")
    for name, runs in results.items():
        medians = [
            statistics.median(run[key] for run in runs)
            for key in ("tokens_per_second", "supervised_per_second", "peak_rss_mib")
        ]
        line = f"{name:<20}{medians[0]:8.0f}  {medians[1]:12.1f}  {medians[2]:8.0f}"
        if name == "ours":
            line += f"  {statistics.median(run['tokens_per_cpu_second'] for run in runs):.0f} tokens per CPU second"
        # Ratios are taken within a round, because the machine's speed changes from round to round.
        if ours and name != "ours":
            speedup = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, runs, strict=True)]
            cpu_speedup = [
                a["tokens_per_cpu_second"] / b["tokens_per_cpu_second"] for a, b in zip(ours, runs, strict=True)
            ]
            memory_ratio = statistics.median(
                a["peak_rss_mib"] / b["peak_rss_mib"] for a, b in zip(ours, runs, strict=True)
            )
            max_loss_difference = max(abs(a / b - 1) for a, b in zip(ours[0]["losses"], runs[0]["losses"], strict=True))
            line += f"  {statistics.median(speedup):6.2f} ({min(speedup):.2f}-{max(speedup):.2f})"
            line += f"  {statistics.median(cpu_speedup):6.2f} ({min(cpu_speedup):.2f}-{max(cpu_speedup):.2f})"
            line += f"  {memory_ratio:14.2f}  {max_loss_difference:20.2%}"
        print(line, flush=True)
    # The losses of one round, since a contestant computes the same ones in every round.
    for name, runs in results.items():
        print(f"{name:<20}losses " + " ".join(f"{loss:.3f}" for loss in runs[0]["losses"]))


# --- the inputs, which all contestants share ---


def prepare_base(options: argparse.Namespace) -> None:
    """Make the 4-bit base by the pipeline's own step, unless it exists."""
    sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
    folder = options.work / "base_nf4"
    if (folder / "quantization.json").is_file():
        return
    from components.quantize_model.step import run
    from qlora_retrain.config.sections import QuantizeConfig

    folder.mkdir(parents=True, exist_ok=True)
    run(QuantizeConfig(), options.base, folder)


def prepare_rows(options: argparse.Namespace) -> None:
    """Write rows as tokens and labels, in the order in which every contestant sees them."""
    from components.train_qlora.data import LengthGroupedSampler

    lines = shuffled_lines(options)
    rows: list[dict[str, list[int]]] = []
    num_rows = options.steps * options.micro_batch_size * options.gradient_accumulation
    texts = iter(lines * 20)  # long rows take many lines each
    while len(rows) < num_rows:
        row: dict[str, list[int]] = {"input_ids": [], "labels": []}
        while not row["input_ids"] or (options.row_tokens and len(row["input_ids"]) < options.row_tokens):
            for name, values in tokenize(options, next(texts)).items():
                row[name] += values
        rows.append({name: values[: options.row_tokens] for name, values in row.items()})

    sampler = LengthGroupedSampler(
        [len(row["input_ids"]) for row in rows], options.micro_batch_size * options.gradient_accumulation, options.seed
    )
    (options.work / "rows.json").write_text(json.dumps([rows[i] for i in sampler]))


def shuffled_lines(options: argparse.Namespace) -> list[dict[str, str]]:
    """Return the lines of BANKING77's train.csv in the seed's order."""
    with (options.data / "train.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    random.Random(options.seed).shuffle(lines)
    return lines


def as_chat(line: dict[str, str]) -> list[dict[str, str]]:
    """Return a line of BANKING77 as a chat."""
    turns = [("system", SYSTEM_PROMPT), ("user", line["text"]), ("assistant", line["category"])]
    return [{"role": role, "content": text} for role, text in turns]


def tokenize(options: argparse.Namespace, line: dict[str, str]) -> dict[str, list[int]]:
    """Return a line of BANKING77 as a chat's tokens and labels."""
    from components.train_qlora.data import IGNORE_INDEX

    (encoded,) = load_tokenizer(options.base).encode(as_chat(line))
    pairs = zip(encoded.input_ids, encoded.supervised, strict=True)
    return {
        "input_ids": encoded.input_ids,
        "labels": [token if is_supervised else IGNORE_INDEX for token, is_supervised in pairs],
    }


@functools.cache
def load_tokenizer(base: Path) -> Any:
    """Load the model's tokenizer with its chat template, once."""
    from qlora_retrain.lm import chat

    return chat.load_tokenizer(base)


def train_contestant(options: argparse.Namespace) -> dict[str, Any]:
    """Train as one contestant; return speed after the warm-up, peak memory and the loss of each step."""
    sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
    warnings.filterwarnings("ignore")
    rows = json.loads((options.work / "rows.json").read_text())
    is_ours = options.contestant.startswith("ours")
    trainer = contestants.TRAINER_FACTORIES[options.contestant](options, rows)
    result = train_and_time(options, trainer, rows)
    # Ours trains in a child of the step's process, so the memory of the step's process is added.
    if is_ours:
        result["peak_rss_mib"] += launcher_rss_mib()
    return {**result, "eval_loss": eval_loss(options, trainer.model)}


def launcher_rss_mib() -> float:
    """Measure the memory of the step's other processes: the launcher and multiprocessing's resource tracker."""
    # A spawned child takes the place of the one that trains. It is not counted, but the cost of starting it is.
    program = (
        "import multiprocessing, os, psutil, time, components.train_qlora.step\n"
        "if __name__ == '__main__':\n"
        "    trainer = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(2,))\n"
        "    trainer.start()\n"
        "    launcher = psutil.Process()\n"
        "    others = [child for child in launcher.children() if child.pid != trainer.pid]\n"
        "    print(sum(process.memory_info().rss for process in [launcher, *others]))\n"
    )
    process = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return int(process.stdout) / 2**20


def train_and_time(options: argparse.Namespace, trainer: Any, rows: list[Any]) -> dict[str, Any]:
    """Train; return speed after the warm-up, peak memory of the process until now and the loss of each step."""
    clock = new_step_clock()
    trainer.add_callback(clock)
    trainer.train()
    from components.train_qlora.data import IGNORE_INDEX

    # The clock starts at the end of the last warm-up step.
    global_batch_size = options.micro_batch_size * options.gradient_accumulation
    counted_rows = rows[WARMUP_STEPS * global_batch_size : options.steps * global_batch_size]
    seconds, cpu_seconds = (a - b for a, b in zip(clock.step_ends[-1], clock.step_ends[WARMUP_STEPS - 1], strict=True))
    supervised = sum(sum(label != IGNORE_INDEX for label in row["labels"][1:]) for row in counted_rows)
    return {
        "tokens_per_second": sum(len(row["input_ids"]) for row in counted_rows) / seconds,
        "tokens_per_cpu_second": sum(len(row["input_ids"]) for row in counted_rows) / cpu_seconds,
        "supervised_per_second": supervised / seconds,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def eval_loss(options: argparse.Namespace, model: Any) -> float | None:
    """Return the mean loss of the rows of `compare_eval_losses`; all contestants use the same function."""
    from components.train_qlora.data import TokenizedDataset
    from components.train_qlora.loss import mean_loss

    # 2 is the model's pad token, 16 the number of rows in a batch.
    path = options.work / EVAL_FILE
    return mean_loss(model, TokenizedDataset(json.loads(path.read_text())), 2, 16) if path.is_file() else None


def new_step_clock() -> Any:
    """Return a callback that records when each step ended, in wall time and in CPU seconds."""
    from transformers import TrainerCallback

    # process_time counts the CPU seconds of all threads of the process.
    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.step_ends: list[tuple[float, float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.step_ends.append((time.perf_counter(), time.process_time()))

    return StepClock()


OPERATIONS_BY_KIND = {
    "products of frozen layers and adapters": ("aten::mm", "aten::addmm_", "aten::addmm"),
    "attention": (
        "aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::_softmax", "aten::_softmax_backward_data",
        "aten::index_select",
    ),
    "unpacking 4 bits": ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise"),
    "random numbers for dropout": ("aten::random_",),
}  # fmt: skip


def profile(options: argparse.Namespace) -> None:
    """Print the time of a micro-batch by kind of operation, and the time that its matrix products alone would take.

    The micro-batch has the rows of medium length.
    """
    import torch

    from components.train_qlora import packing
    from components.train_qlora.data import PaddingCollator
    from components.train_qlora.loss import summed_loss, supervised_mask

    rows = json.loads((options.work / "rows.json").read_text())
    trainer = contestants.make_ours(options, rows)
    model = trainer.model.train()
    first = (len(rows) - options.micro_batch_size) // 2
    batch = PaddingCollator(2)(
        sorted(rows, key=lambda row: len(row["input_ids"]))[first : first + options.micro_batch_size]
    )

    # The third run is timed, after warming up; the run under the profiler is slower.
    for _ in range(3):
        start = time.perf_counter()
        summed_loss(model, batch).backward()
        seconds = time.perf_counter() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        summed_loss(model, batch).backward()

    cpu_seconds = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    total, attributed = sum(cpu_seconds.values()), 0.0
    for kind, names in OPERATIONS_BY_KIND.items():
        kind_seconds = sum(cpu_seconds.get(name, 0.0) for name in names)
        attributed += kind_seconds
        print(f"{kind:<40}{kind_seconds / total:6.1%}")
    print(f"{'all else (elementwise, copies, Python)':<40}{1 - attributed / total:6.1%}")

    # A product of (m, k) and (k, n) takes 2 m k n multiplications and additions. Per token, a frozen weight takes part
    # in two of them (forward, the input's gradient: 4), a trained one in three (its own gradient too: 6).
    packed = packing.pack(batch, model.dtype)
    num_tokens, num_computed = int(batch["attention_mask"].sum()), packed.input_ids.shape[1]
    frozen = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "lora_A"))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lm_head = model.get_output_embeddings().weight.numel()
    flop = num_computed * (4 * frozen + 6 * trainable) + int(supervised_mask(batch).sum()) * 4 * lm_head

    flop_per_second = max_flop_per_second()
    limit_seconds = flop / flop_per_second
    print(
        f"{num_tokens} tokens in {options.micro_batch_size} rows, {num_computed} computed; "
        f"{seconds:.2f} s, {num_tokens / seconds:.0f} tokens/s"
    )
    print(
        f"{flop / 1e9:.0f} GFLOP at {flop_per_second / 1e9:.0f} GFLOP/s: "
        f"{limit_seconds:.2f} s, {num_tokens / limit_seconds:.0f} tokens/s"
    )


def max_flop_per_second() -> float:
    """Measure the machine's best speed in a bf16 product so large that only its arithmetic takes time."""
    import torch

    square = torch.randn(2048, 2048).bfloat16()
    speeds = []
    for _ in range(5):
        start = time.perf_counter()
        square @ square
        speeds.append(2 * 2048**3 / (time.perf_counter() - start))
    return max(speeds)


if __name__ == "__main__":
    main()
