"""Compare the training step on one NVIDIA GPU with TRL and Unsloth, on models of real shapes with random weights.

All contestants train on the same 4-bit model and the same rows in the same order, with the same rank, layers, learning
rate, optimizer and batch. Each runs in a process of its own. The table has tokens per second after the first three
steps, the peak of allocated memory, the share of the card's own speed in large bf16 products that the necessary
arithmetic of a step reaches, and whether the loss of the first step is that of `ours`. Beside our peaks is what a plan
predicts (docs/planning.md).

    python benchmarks/gpu.py                 8B and 1B: chats of about 200 tokens, rows of 2,048, and our
                                             ways to compute attention side by side; within 9 minutes
    python benchmarks/gpu.py --large         70B in 48 GB, 33B in 24 GB, 8B in 8 GB with paged states: peaks
    python benchmarks/gpu.py --dry-run       a tiny model on the CPU: whether everything runs

What the card cannot hold is listed as not run. TRL (`make bench-setup`), Liger and Unsloth take part where they are
installed. The results are written to benchmarks/results-gpu.json after every contestant.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_contestants
import gpu_models

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks" / "results-gpu.json"
WARMUP_STEPS = 3  # not counted: kernels are compiled, allocators grow
GIB = 2**30

# Shape, kind of rows, rows of a micro-batch, micro-batches of a step, steps, optimizer, contestants.
ALL = ("ours, liger", "trl, tuned", "unsloth", "ours", "trl")
LONG = ("ours, liger", "trl, tuned", "unsloth", "ours, liger, checkpointing", "unsloth, checkpointing", "trl")
BACKENDS = ("ours (varlen, shared prefix)", "ours (varlen)", "ours (rows with a bias)", "ours (padded)")
JOBS: list[tuple[str, str, int, int, int, str, tuple[str, ...]]] = [
    ("8b", "chat", 16, 1, 12, "paged_adamw_32bit", ALL),
    ("8b", "2048", 4, 1, 8, "paged_adamw_32bit", LONG),
    # What most people run: small micro-batches, 8-bit states, checkpointing.
    ("8b", "2048", 2, 4, 6, "paged_adamw_8bit", ("ours, liger, checkpointing", "unsloth, checkpointing")),
    ("1b", "chat", 16, 1, 15, "paged_adamw_32bit", ALL),
    ("1b", "system", 16, 1, 12, "paged_adamw_32bit", BACKENDS),
]
# The same with the memory, in GiB, that the card may use; only whether it runs and its peak count.
LARGE_JOBS = [("70b", "512", 48), ("33b", "512", 24), ("8b", "512", 8)]
TINY_JOBS = [
    ("tiny", "chat", 4, 1, 5, "paged_adamw_32bit", ("ours", "ours, checkpointing", "trl", "trl, tuned")),
    ("tiny", "system", 4, 1, 5, "paged_adamw_32bit", BACKENDS),
]


def main() -> None:
    """Run every job that the card can hold, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--large", action="store_true", help="the largest models that a memory holds")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--only", nargs="+", choices=sorted(gpu_contestants.CONTESTANTS))
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "bench-gpu", help="for models; 50 GB for 70B")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin nothing after that")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for each contestant")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.job:
        print(json.dumps(run_job(argparse.Namespace(**{**vars(options), **json.loads(options.job)}))))
        return

    device = "cpu" if options.dry_run else "cuda"
    card = run_process(options, {"kind": "card", "device": device})
    if "error" in card:
        raise SystemExit(f"no NVIDIA GPU that torch can use: {card['error']}; --dry-run tries everything on the CPU")
    print(f"{card['name']}, {card['memory_gib']:.0f} GiB, {card['tflops']:.0f} TFLOP/s in bf16 products")

    document = {"date": datetime.date.today().isoformat(), "card": card, "results": []}
    first_losses: dict[str, float] = {}
    deadline = time.monotonic() + options.minutes * 60
    for job in large_jobs(card) if options.large else list(jobs(options, device)):
        is_late = time.monotonic() > deadline
        result = {**job, **({"not_run": "no time was left"} if is_late else job_result(options, job, card))}
        if job["name"].startswith("ours"):
            result["predicted_gib"] = round(gpu_models.predicted_gib(job), 2)
        if "tokens_per_second" in result:
            result["peak_share"] = round(result["tflops"] / card["tflops"], 3)
            first = first_losses.setdefault(f"{job['shape']} {job['rows']}", result["losses"][0])
            result["first_loss_differs_by"] = round(abs(result["losses"][0] - first), 4)
        print(describe(result), flush=True)
        document["results"].append(result)
        if not options.dry_run:
            RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def jobs(options: argparse.Namespace, device: str) -> Any:
    """Yield every contestant of every job as the arguments of its process."""
    for shape, rows, micro_batch_size, accumulation, steps, optimizer, names in TINY_JOBS if options.dry_run else JOBS:
        for name in names:
            if options.only is None or name in options.only:
                yield {
                    "kind": "train", "name": name, "shape": shape, "rows": rows, "micro_batch_size": micro_batch_size,
                    "accumulation": accumulation, "steps": steps, "optimizer": optimizer, "device": device,
                    "cap_gib": None,
                }  # fmt: skip


def large_jobs(card: dict[str, Any]) -> Any:
    """Yield the large models, each within the memory that it is said to fit in."""
    for shape, rows, cap_gib in LARGE_JOBS:
        yield {
            "kind": "train", "name": "ours, checkpointing", "shape": shape, "rows": rows, "micro_batch_size": 1,
            "accumulation": 1, "steps": 5, "optimizer": "paged_adamw_8bit", "device": "cuda",
            "cap_gib": min(cap_gib, card["memory_gib"]),
        }  # fmt: skip


def job_result(options: argparse.Namespace, job: dict[str, Any], card: dict[str, Any]) -> dict[str, Any]:
    """Return what a contestant measured, or why it did not run."""
    memory_gib = job["cap_gib"] or card["memory_gib"]
    # Weights alone; a step needs more, and says itself where that is too much.
    if (needed := gpu_models.weights_gib(job["shape"])) > 0.95 * memory_gib:
        return {"not_run": f"its weights take {needed:.0f} GiB of {memory_gib:.0f}"}
    name = job["name"]
    package = {"trl": "trl", "uns": "unsloth"}.get(name[:3], "liger_kernel" if "liger" in name else "torch")
    if package not in card["packages"]:
        return {"not_run": f"{package} is not installed"}
    failure = run_process(options, {**job, "kind": "model"})
    return failure or run_process(options, job)


def run_process(options: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a process of its own; return the last line of its output, or the error that ended it."""
    paths = [str(PROJECT), str(PROJECT / "src"), str(PROJECT / ".state" / "bench"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, "--work", str(options.work), "--job", json.dumps(job)]
    timeout = 3 * options.timeout if job["kind"] == "model" else options.timeout
    try:
        process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {timeout:.0f} s"}
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        return {"error": (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1][:300]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def run_job(job: argparse.Namespace) -> dict[str, Any]:
    """Do what a process was started for."""
    warnings.filterwarnings("ignore")
    folder = job.work / f"{getattr(job, 'shape', '')}-nf4"
    if job.kind == "card":
        return describe_card(job.device)
    if job.kind == "model":
        gpu_models.make_model(job.shape, folder, job.device)
        return {}
    return train(job, folder)


def describe_card(device: str) -> dict[str, Any]:
    """Return the card's name, its memory, and its best speed in a bf16 product."""
    import torch

    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / 10)
    properties = torch.cuda.get_device_properties(0) if device == "cuda" else None
    packages = ("torch", "transformers", "bitsandbytes", "peft", "trl", "liger_kernel", "unsloth")
    return {
        "name": properties.name if properties else "CPU",
        "memory_gib": properties.total_memory / GIB if properties else 1e3,
        "tflops": 2 * size**3 / min(seconds) / 1e12,
        "torch": torch.__version__,
        "packages": [name for name in packages if find_spec(name)],
    }


def train(job: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train as one contestant, and return its speed, its peak of memory and its losses."""
    if "unsloth" in job.name:
        import unsloth  # noqa: F401 - before torch and transformers
    import torch

    is_gpu, rows_of_step = job.device == "cuda", job.micro_batch_size * job.accumulation
    if job.cap_gib:
        total_gib = torch.cuda.get_device_properties(0).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.cap_gib / total_gib))
    rows = gpu_models.new_rows(job.shape, job.rows, job.steps * rows_of_step)
    trainer = gpu_contestants.CONTESTANTS[job.name](job, folder, rows)

    times: list[float] = []

    def end_step(*_: Any, **__: Any) -> None:
        if is_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    trainer.add_callback(step_callback(end_step))
    trainer.train()
    steps = [b - a for a, b in zip(times[WARMUP_STEPS - 1 :], times[WARMUP_STEPS:], strict=False)]
    # Rows differ in length, so the speed is that of all counted steps together.
    counted, elapsed = rows[WARMUP_STEPS * rows_of_step :], times[-1] - times[WARMUP_STEPS - 1]
    lengths = [len(row["input_ids"]) for row in counted]
    supervised = sum(label != gpu_models.IGNORE_INDEX for row in counted for label in row["labels"][1:])
    return {
        "tokens_per_second": round(sum(lengths) / elapsed),
        "median_step_seconds": round(statistics.median(steps), 4),
        "tflops": gpu_models.necessary_flop(job.shape, lengths, supervised) / elapsed / 1e12,
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if is_gpu else None,
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
    }


def step_callback(end_step: Any) -> Any:
    """Return a callback for a Trainer that only calls this at the end of every step."""
    from transformers import TrainerCallback

    return type("StepClock", (TrainerCallback,), {"on_step_end": staticmethod(end_step)})()


def describe(result: dict[str, Any]) -> str:
    """Return the line of a result for a person."""
    where = f"{result['shape']:>5} {result['rows']:>5} {result['micro_batch_size']:>2} x {result['accumulation']}"
    if reason := result.get("not_run") or result.get("error"):
        return f"{where}  {result['name']:<28} {'not run' if 'not_run' in result else 'failed'}: {reason}"
    peak = "" if result["peak_gib"] is None else f"{result['peak_gib']:7.2f} GiB"
    if peak and "predicted_gib" in result:
        peak += f" ({result['predicted_gib']:.2f} predicted)"
    return (
        f"{where}  {result['name']:<28}{result['tokens_per_second']:>8,} tokens/s{peak}"
        f"{result['peak_share']:>7.0%} of the card's peak, first loss differs by {result['first_loss_differs_by']}"
    )


if __name__ == "__main__":
    main()
