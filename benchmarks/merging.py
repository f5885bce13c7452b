"""Compare memory and time of our merge with PEFT's `merge_and_unload`, on a model of 3 billion weights on disk.

Builds once: a random model of Llama's shape in bf16, in shards (`base`), its NF4 form with double quantization (`nf4`)
and a rank-16 adapter on every linear layer. The contestants run in processes of their own, in turn, round after round:

    original      our merge into the 16-bit base
    dequantized   our merge into the values of the 4-bit base
    both          the two candidates that `merge.base: measured` builds
    peft          load the 16-bit model, attach the adapter, `merge_and_unload`, `save_pretrained`

Time is measured from reading the base to the written folder, without imports. Memory is the anonymous memory of the
process (RssAnon, read 50 times a second by the parent). Mapped files do not count, since the system can drop their
pages. Prints medians, each round's ratios to `peft`, the bound of our merge, and by how much the weights differ.

Command: `python benchmarks/merging.py [--layers 28] [--rounds 3] [--work DIR]`
Needs disk for 5 of the models (32 GB at the default size) and, for PEFT, memory for 2.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
CONTESTANTS = ("original", "dequantized", "both", "peft")
GIB = 2**30
# The shape of Llama 3.2 3B.
HIDDEN_SIZE, INTERMEDIATE_SIZE, VOCAB_SIZE, NUM_HEADS, NUM_KV_HEADS, RANK = 3072, 8192, 128_256, 24, 8, 16
LINEAR = {
    "self_attn.q_proj": (HIDDEN_SIZE, HIDDEN_SIZE),
    "self_attn.k_proj": (HIDDEN_SIZE * NUM_KV_HEADS // NUM_HEADS, HIDDEN_SIZE),
    "self_attn.v_proj": (HIDDEN_SIZE * NUM_KV_HEADS // NUM_HEADS, HIDDEN_SIZE),
    "self_attn.o_proj": (HIDDEN_SIZE, HIDDEN_SIZE),
    "mlp.gate_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
    "mlp.up_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
    "mlp.down_proj": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
}


def main() -> None:
    """Build the missing inputs, run the contestants in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=28, help="28: 3.2 billion weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "bench-merging")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(run_contestant(options)))
        return
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    refuse_small_machine(options)
    build_inputs(options)

    # Contestants take turns, so that a change of the machine's load affects all of them.
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for number in range(options.rounds):
        for name in options.only:
            results[name].append(run_in_process(options, name))
            print(f"round {number + 1}: {name:12}", json.dumps(results[name][-1]), flush=True)
    print_table(options, results)
    if {"original", "peft"} <= set(options.only):
        print(compare_weights(work / "out-original", work / "out-peft"))
    for name in options.only:
        shutil.rmtree(work / f"out-{name}")


def num_weights(layers: int) -> int:
    """Return how many weights the model has."""
    linear = sum(rows * columns for rows, columns in LINEAR.values())
    return VOCAB_SIZE * HIDDEN_SIZE + HIDDEN_SIZE + layers * (linear + 2 * HIDDEN_SIZE)


def refuse_small_machine(options: argparse.Namespace) -> None:
    """Exit where disk or memory is too small."""
    model_bytes = 2 * num_weights(options.layers)
    used_bytes = sum(p.stat().st_size for p in options.work.rglob("*") if p.is_file())
    free_bytes = shutil.disk_usage(options.work).free + used_bytes
    if free_bytes < 5 * model_bytes:
        sys.exit(
            f"{options.work}: {free_bytes / GIB:.0f} GiB of disk are free, {5 * model_bytes / GIB:.0f} are needed: "
            "give another --work or fewer --layers"
        )

    # PEFT needs memory for two models.
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available_bytes = int(meminfo["MemAvailable"].split()[0]) * 1024
    if "peft" in options.only and available_bytes < 2.2 * model_bytes:
        sys.exit(
            f"{available_bytes / GIB:.0f} GiB of memory are available, PEFT may take {2.2 * model_bytes / GIB:.0f}: "
            "leave peft out with --only"
        )


def build_inputs(options: argparse.Namespace) -> None:
    """Write the base in shards of 2 GiB, its 4-bit form and the adapter, where they are not there yet."""
    import torch

    # The numbers do not matter for memory and time; the same ones make `compare_weights` repeatable.
    torch.manual_seed(0)
    specs = shapes(options.layers)
    base, nf4, adapter = (options.work / name for name in ("base", "nf4", "adapter"))
    print(f"{num_weights(options.layers) / 1e9:.2f} billion weights", flush=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": options.layers,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    # The config is written last, so a folder that has it is complete.
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    for folder in (base, nf4, adapter):
        document = config | ({"quantization_config": quantization} if folder == nf4 else {})
        if not (folder / "config.json").is_file() or json.loads((folder / "config.json").read_text()) != document:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            {"base": build_base, "nf4": build_nf4, "adapter": build_adapter}[folder.name](folder, specs)
            (folder / "config.json").write_text(json.dumps(document))


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return every tensor's name and shape; the output layer is the embedding."""
    specs: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN_SIZE)}
    for layer in range(layers):
        specs |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEAR.items()}
        specs |= {
            f"model.layers.{layer}.{norm}_layernorm.weight": (HIDDEN_SIZE,) for norm in ("input", "post_attention")
        }
    return specs | {"model.norm.weight": (HIDDEN_SIZE,)}


def build_base(folder: Path, specs: dict[str, tuple[int, ...]]) -> None:
    """Write random numbers of the size of trained weights."""
    import torch

    from qlora_retrain.lm.weight_files import TensorSpec, write_safetensors

    write_safetensors(
        folder,
        [TensorSpec(name, torch.bfloat16, shape) for name, shape in specs.items()],
        lambda name: torch.empty(specs[name], dtype=torch.bfloat16).normal_(std=0.02),
        2.0,
    )


def build_nf4(folder: Path, specs: dict[str, tuple[int, ...]]) -> None:
    """Write the linear layers as bitsandbytes stores them, one file each; a merge reads nothing else from here."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file

    from qlora_retrain.lm.weight_files import SafetensorsFolder

    # Double quantization, as `quantize_model` stores a base by default.
    index: dict[str, str] = {}
    with SafetensorsFolder(folder.parent / "base") as base:
        for name in (name for name in specs if "_proj" in name):
            packed, state = quantize_4bit(base.tensor(name), quant_type="nf4", compress_statistics=True)
            parts = {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
            file = f"{name}.safetensors"
            save_file({name: packed, **parts}, folder / file)
            index |= dict.fromkeys([name, *parts], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def build_adapter(folder: Path, specs: dict[str, tuple[int, ...]]) -> None:
    """Write an adapter of rank 16 on every linear layer, as PEFT stores it."""
    import torch
    from safetensors.torch import save_file

    # Both matrices are random: a B of zeros, as before training, would add nothing.
    tensors = {}
    for name, shape in specs.items():
        if "_proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = torch.empty(RANK, shape[1]).normal_(std=0.02)
            tensors[f"{key}.lora_B.weight"] = torch.empty(shape[0], RANK).normal_(std=0.02)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in LINEAR}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def run_contestant(options: argparse.Namespace) -> dict[str, float]:
    """Run one merge in this process, and return its seconds."""
    import warnings

    warnings.filterwarnings("ignore")

    out = options.work / f"out-{options.contestant}"
    out.mkdir()
    prepare = prepare_peft if options.contestant == "peft" else prepare_ours
    merges = list(prepare(options, out))  # imports happen here
    imports_bytes = rss_anon_bytes(os.getpid())

    start, cpu_start = time.perf_counter(), cpu_seconds()
    for merge in merges:
        merge()
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(cpu_seconds() - cpu_start, 2),
        "imports_gib": round(imports_bytes / GIB, 3),
    }


def prepare_ours(options: argparse.Namespace, out: Path) -> Iterator[Any]:
    """Yield the step's merges as functions without arguments."""
    import bitsandbytes.functional  # noqa: F401

    from components.merge_adapter.merge import merge

    folders = (options.work / "base", options.work / "nf4", options.work / "adapter")
    bases = {"both": ("original", "dequantized")}.get(options.contestant, (options.contestant,))
    for base in bases:
        target = out if len(bases) == 1 else out / base
        target.mkdir(exist_ok=True)
        yield lambda target=target, base=base: merge(
            *folders, target, dequantized=base == "dequantized", max_shard_gib=2.0
        )


def prepare_peft(options: argparse.Namespace, out: Path) -> Iterator[Any]:
    """Yield the merge that PEFT's documentation shows."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load_merge_and_save() -> None:
        model = AutoModelForCausalLM.from_pretrained(options.work / "base", dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, str(options.work / "adapter")).merge_and_unload()
        merged.save_pretrained(out, max_shard_size="2GB")

    yield load_merge_and_save


def run_in_process(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Run a contestant in a process of its own, and sample its memory from outside."""
    shutil.rmtree(options.work / f"out-{name}", ignore_errors=True)
    os.sync()  # so that this contestant does not wait for the writes of the one before it

    command = [sys.executable, __file__, "--contestant", name, "--work", str(options.work)]
    # Sampled by the parent, since a thread of the contestant would be delayed by the work that it measures.
    peak = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, rss_anon_bytes(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    if process.returncode:
        sys.exit(f"{name}: the merge exited with code {process.returncode}")
    return json.loads(lines[-1]) | {"peak_gib": round(peak / GIB, 3)}


def rss_anon_bytes(pid: int) -> float:
    """Return the anonymous resident memory of a process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("RssAnon")), 0.0)


def cpu_seconds() -> float:
    """Return the CPU time of this process, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def print_table(options: argparse.Namespace, results: dict[str, list[dict[str, float]]]) -> None:
    """Print medians, and the ratios of each round."""
    bound_gib = 4 * 4 * VOCAB_SIZE * HIDDEN_SIZE / GIB + 1
    print(f"\nbound of our merge: 4 x the largest tensor in fp32 + 1 GiB = {bound_gib:.2f} GiB")
    print("contestant    peak anonymous GiB   seconds   CPU seconds   memory / peft   time / peft   CPU / peft")
    for name, runs in results.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        line = f"{name:12}  {medians['peak_gib']:18.2f}  {medians['seconds']:8.1f}  {medians['cpu_seconds']:12.1f}"
        if "peft" in results:
            # Ratios are taken within a round, because the machine's load changes from round to round.
            for key in ("peak_gib", "seconds", "cpu_seconds"):
                ratios = [run[key] / peer[key] for run, peer in zip(runs, results["peft"], strict=True)]
                line += f"   {min(ratios):.2f}-{max(ratios):.2f}  "
        print(line)


def compare_weights(first: Path, second: Path) -> str:
    """Return how far apart two folders' weights are, tensor by tensor."""
    from qlora_retrain.lm.weight_files import SafetensorsFolder

    num_equal = total = 0
    max_ulps = 0.0
    with SafetensorsFolder(first) as ours, SafetensorsFolder(second) as theirs:
        for name in ours.names:
            a, b = ours.tensor(name), theirs.tensor(name)
            num_equal, total = num_equal + int((a == b).sum()), total + a.numel()
            # In units in the last place of a bf16 number.
            relative = (a.float() - b.float()).abs_().div_(b.float().abs_().clamp_(min=2**-20)).max()
            max_ulps = max(max_ulps, float(relative) * 2**7)
    return (
        f"original and peft: {num_equal / total:.4%} of the weights are the same bits, "
        f"none differs by more than {max_ulps:.1f} units in the last place"
    )


if __name__ == "__main__":
    main()
