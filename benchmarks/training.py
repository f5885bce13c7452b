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
of tokens a second (padding not counted), of supervised tokens a second, of peak resident memory, and the ratio to ours
round by round, by the clock and by CPU seconds, which a machine that others use changes less. With
`--dropout 0` it also compares the losses of every step.

Command: `python benchmarks/training.py --data FOLDER [--dropout 0.05] [--sweep length|rank|batch] [--profile]`
FOLDER holds BANKING77's train.csv; `make bench-setup` fetches TRL. `--profile` says where the time of our step goes,
and what the matrix products alone would take at the speed that a large one has here.
"""

from __future__ import annotations

import argparse
import csv
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

PROJECT = Path(__file__).resolve().parents[1]
PEERS = PROJECT / ".state" / "bench"
BASE = PROJECT / ".state" / "base" / "smollm2-135m-instruct"
CONTESTANTS = ("ours", "ours, lean", "ours, 16 bits", "trainer", "trl", "trl, tuned")
UNCOUNTED_STEPS = 2
SWEEPS = {"length": (128, 256, 512, 1024, 2048), "rank": (4, 8, 16, 32, 64), "batch": (1, 2, 4, 8, 16)}
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
            for key in ("data", "base", "steps", "dropout", "rank", "batch", "accumulation", "work"):
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
    from components.train_qlora.rows import IGNORED, Order
    from qlora_retrain import chat

    tokenizer = chat.load_tokenizer(options.base)
    with (options.data / "train.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    random.Random(0).shuffle(lines)
    rows: list[dict[str, list[int]]] = []
    wanted = options.steps * options.batch * options.accumulation
    texts = iter(lines * 20)
    while len(rows) < wanted:
        row: dict[str, list[int]] = {"input_ids": [], "labels": []}
        while not row["input_ids"] or (options.length and len(row["input_ids"]) < options.length):
            line = next(texts)
            said = [("system", SYSTEM), ("user", line["text"]), ("assistant", line["category"])]
            encoded = chat.encode(tokenizer, [{"role": role, "content": text} for role, text in said])
            row["input_ids"] += encoded.input_ids
            row["labels"] += [
                token if learn else IGNORED for token, learn in zip(encoded.input_ids, encoded.supervised, strict=True)
            ]
        rows.append({name: values[: options.length] for name, values in row.items()})
    order = Order([len(row["input_ids"]) for row in rows], options.batch * options.accumulation, seed=0)
    (options.work / "rows.json").write_text(json.dumps([rows[i] for i in order]))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Train as one contestant; speed after the first steps, peak memory, the loss of each step."""
    sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
    warnings.filterwarnings("ignore")
    rows = json.loads((options.work / "rows.json").read_text())
    trainer = MAKERS[options.contestant](options, rows)
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
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data"),
    "unpacking 4 bits": ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise"),
    "random numbers for dropout": ("aten::random_", "aten::ge"),
    "optimizer": ("Optimizer.step#AdamW.step", "bitsandbytes::optimizer_update_32bit"),
}


def profile(options: argparse.Namespace) -> None:
    """Where the time of one forward and backward pass of ours goes, by kind, against the products' own limit."""
    import torch

    from components.train_qlora import packed
    from components.train_qlora.loss import summed_loss, supervised
    from components.train_qlora.rows import Collate

    rows = json.loads((options.work / "rows.json").read_text())
    trainer = make_ours(options, rows)
    model = trainer.model.train()
    batch = Collate(2)(rows[: options.batch])
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


# --- the contestants ---


def make_ours(options: argparse.Namespace, rows: list[Any], *, bits: int = 4, checkpointing: int | None = None) -> Any:
    """The trainer of the step, over the 4-bit or the 16-bit base."""
    from transformers import set_seed

    from components.train_qlora import lora
    from components.train_qlora.rows import Rows
    from components.train_qlora.trainer import AdapterTrainer
    from qlora_retrain import modeling
    from qlora_retrain.config.sections import TrainConfig

    config = TrainConfig(
        rank=options.rank, alpha=2 * options.rank, dropout=options.dropout, learning_rate=2e-4, schedule="constant",
        warmup=0.0, batch_size=options.batch, gradient_accumulation=options.accumulation, max_steps=options.steps,
        device="cpu", precision="bfloat16", attention="eager", checkpoint_minutes=1e6,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    if bits == 4:
        base = modeling.load_nf4(options.work / "base_nf4", attention="eager", dtype="bfloat16")
    else:
        base = modeling.load_base(options.base, attention="eager", dtype="bfloat16")
    set_seed(0)
    trainer = AdapterTrainer(lora.attach_new(base, config), config, Rows(rows), Rows([]), 2, options.work / "scratch")
    trainer.order = range(len(rows))
    trainer._save_checkpoint = lambda *_: None
    return trainer


def peer_model(options: argparse.Namespace, attention: str) -> Any:
    """The 4-bit base as the peers load it."""
    from transformers import AutoModelForCausalLM, set_seed

    folder = options.work / "base_nf4"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=attention)
    model.config.use_cache = False
    set_seed(0)
    return model


def peer_settings(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """What must be equal for a comparison, and nothing else."""
    from peft import LoraConfig

    arguments = {
        "output_dir": str(options.work / "peer"), "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulation, "max_steps": options.steps, "learning_rate": 2e-4,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "train_sampling_strategy": "sequential", "seed": 0,
    }  # fmt: skip
    adapter = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return arguments, adapter


def make_trl(options: argparse.Namespace, rows: list[Any], *, tuned: bool = False) -> Any:
    """TRL's SFTTrainer; `tuned` for short rows on a CPU."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments, adapter = peer_settings(options)
    best = {"gradient_checkpointing": False} if tuned else {}
    return SFTTrainer(
        model=peer_model(options, "eager" if tuned else "sdpa"),
        args=SFTConfig(**arguments, **best, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.base),
        peft_config=adapter,
    )


def make_trainer(options: argparse.Namespace, rows: list[Any]) -> Any:
    """The Trainer of transformers with PEFT, as its documentation has it."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    arguments, adapter = peer_settings(options)
    return Trainer(
        model=get_peft_model(peer_model(options, "sdpa"), adapter),
        args=TrainingArguments(**arguments),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(options.base)),
    )


MAKERS: dict[str, Any] = {
    "ours": make_ours,
    "ours, lean": lambda options, rows: make_ours(options, rows, checkpointing=1),
    "ours, 16 bits": lambda options, rows: make_ours(options, rows, bits=16),
    "trainer": make_trainer,
    "trl": make_trl,
    "trl, tuned": lambda options, rows: make_trl(options, rows, tuned=True),
}

if __name__ == "__main__":
    main()
