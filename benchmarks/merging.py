"""How lean and how fast the merge is, beside PEFT's `merge_and_unload`, on a model of 3 billion weights on disk.

Builds, once: a random model of Llama's shape in bf16, in shards (`base`), its NF4 form with double quantization (`nf4`)
and a rank-16 adapter on every linear layer. Contestants, each in a process of its own, in turn, round after round:

    original      our merge into the 16-bit base
    dequantized   our merge into the values of the 4-bit base
    both          the two candidates that `merge.base: measured` builds
    peft          load the 16-bit model, attach the adapter, `merge_and_unload`, `save_pretrained`

From reading the base to the written folder, imports not counted. Memory is the anonymous memory of the process
(RssAnon, read 50 times a second from outside): mapped files do not count, since the system can drop their pages. Prints
medians, each round's ratios to `peft`, the bound of our merge, and by how much the weights differ.

Command: `python benchmarks/merging.py [--layers 28] [--rounds 3] [--work DIR]`
Needs disk for 4 of the models (26 GB at the default size) and, for PEFT, memory for 2.
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
HIDDEN, INNER, VOCABULARY, HEADS, GROUPS, RANK = 3072, 8192, 128_256, 24, 8, 16  # Llama 3.2 3B's shape
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * GROUPS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * GROUPS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def main() -> None:
    """Build what is missing, run the contestants in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=28, help="28: 3.2 billion weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "bench-merging")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(contest(options)))
        return
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    room(options)
    build(options)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for number in range(options.rounds):
        for name in options.only:
            found[name].append(watched(options, name))
            print(f"round {number + 1}: {name:12}", json.dumps(found[name][-1]), flush=True)
    table(options, found)
    if {"original", "peft"} <= set(options.only):
        print(compared(work / "out-original", work / "out-peft"))
    for name in options.only:
        shutil.rmtree(work / f"out-{name}")


def weights(layers: int) -> int:
    """How many the model has."""
    linear = sum(rows * columns for rows, columns in LINEAR.values())
    return VOCABULARY * HIDDEN + HIDDEN + layers * (linear + 2 * HIDDEN)


def room(options: argparse.Namespace) -> None:
    """Refuse where disk or memory would not do."""
    model = 2 * weights(options.layers)
    built = sum(p.stat().st_size for p in options.work.rglob("*") if p.is_file())
    free = shutil.disk_usage(options.work).free + built
    if free < 5 * model:
        sys.exit(f"{options.work}: {free / GIB:.0f} GiB are free, {5 * model / GIB:.0f} are needed: --work or --layers")
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    if "peft" in options.only and available < 2.2 * model:
        sys.exit(
            f"{available / GIB:.0f} GiB of memory are available, PEFT may take {2.2 * model / GIB:.0f}: --only ours"
        )


def build(options: argparse.Namespace) -> None:
    """The base in shards of 2 GiB, its 4-bit form, the adapter; a folder is complete once its config is there."""
    import torch

    torch.manual_seed(0)
    specs = shapes(options.layers)
    base, nf4, adapter = (options.work / name for name in ("base", "nf4", "adapter"))
    print(f"{weights(options.layers) / 1e9:.2f} billion weights", flush=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": options.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    for folder in (base, nf4, adapter):
        if not (folder / "config.json").is_file() or json.loads((folder / "config.json").read_text()) != config:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            {"base": build_base, "nf4": build_nf4, "adapter": build_adapter}[folder.name](folder, specs)
            (folder / "config.json").write_text(json.dumps(config))


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape; the output layer is the embedding."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEAR.items()}
        found |= {f"model.layers.{layer}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,)}


def build_base(folder: Path, specs: dict[str, tuple[int, ...]]) -> None:
    """Random numbers of a model's size."""
    import torch

    from components.merge_adapter.weights import Spec, write

    write(
        folder,
        [Spec(name, torch.bfloat16, shape) for name, shape in specs.items()],
        lambda name: torch.empty(specs[name], dtype=torch.bfloat16).normal_(std=0.02),
        2.0,
    )


def build_nf4(folder: Path, specs: dict[str, tuple[int, ...]]) -> None:
    """The linear layers as bitsandbytes stores them, a file a layer; what is not 4-bit is not read from here."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file

    from components.merge_adapter.weights import Weights

    index: dict[str, str] = {}
    with Weights(folder.parent / "base") as base:
        for name in (name for name in specs if "_proj" in name):
            packed, state = quantize_4bit(base.tensor(name), quant_type="nf4", compress_statistics=True)
            parts = {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
            file = f"{name}.safetensors"
            save_file({name: packed, **parts}, folder / file)
            index |= dict.fromkeys([name, *parts], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def build_adapter(folder: Path, specs: dict[str, tuple[int, ...]]) -> None:
    """Rank 16 on every linear layer, as PEFT stores it."""
    import torch
    from safetensors.torch import save_file

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


def contest(options: argparse.Namespace) -> dict[str, float]:
    """One merge, in this process."""
    import warnings

    warnings.filterwarnings("ignore")
    out = options.work / f"out-{options.contestant}"
    out.mkdir()
    run = by_peft if options.contestant == "peft" else ours
    work = list(run(options, out))  # imports happen here
    imported = rss_anon(os.getpid())
    before, cpu = time.perf_counter(), cpu_seconds()
    for part in work:
        part()
    return {
        "seconds": round(time.perf_counter() - before, 2),
        "cpu_seconds": round(cpu_seconds() - cpu, 2),
        "imports_gib": round(imported / GIB, 3),
    }


def ours(options: argparse.Namespace, out: Path) -> Iterator[Any]:
    """The merge of the step."""
    import bitsandbytes.functional  # noqa: F401

    from components.merge_adapter.merge import merge

    folders = (options.work / "base", options.work / "nf4", options.work / "adapter")
    kinds = {"both": ("original", "dequantized")}.get(options.contestant, (options.contestant,))
    for kind in kinds:
        target = out if len(kinds) == 1 else out / kind
        target.mkdir(exist_ok=True)
        yield lambda target=target, kind=kind: merge(
            *folders, target, dequantized=kind == "dequantized", max_shard_gib=2.0
        )


def by_peft(options: argparse.Namespace, out: Path) -> Iterator[Any]:
    """What PEFT's documentation says."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(options.work / "base", dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, str(options.work / "adapter")).merge_and_unload()
        merged.save_pretrained(out, max_shard_size="2GB")

    yield work


def watched(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Run a contestant in a process of its own and watch its memory."""
    shutil.rmtree(options.work / f"out-{name}", ignore_errors=True)
    os.sync()  # nobody pays for what another one wrote
    command = [sys.executable, __file__, "--contestant", name, "--work", str(options.work)]
    peak = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, rss_anon(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    if process.returncode:
        sys.exit(f"{name} ended with {process.returncode}")
    return json.loads(lines[-1]) | {"peak_gib": round(peak / GIB, 3)}


def rss_anon(pid: int) -> float:
    """Anonymous resident bytes of a process; 0 where it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("RssAnon")), 0.0)


def cpu_seconds() -> float:
    """Of this process, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def table(options: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and the ratios of each round."""
    bound = 4 * 4 * VOCABULARY * HIDDEN / GIB + 1
    print(f"\nbound of our merge: 4 x the largest tensor in fp32 + 1 GiB = {bound:.2f} GiB")
    print("contestant    peak anonymous GiB   seconds   CPU seconds   memory / peft   time / peft   CPU / peft")
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        line = f"{name:12}  {middle['peak_gib']:18.2f}  {middle['seconds']:8.1f}  {middle['cpu_seconds']:12.1f}"
        if "peft" in found:
            for key in ("peak_gib", "seconds", "cpu_seconds"):
                ratios = [run[key] / peer[key] for run, peer in zip(runs, found["peft"], strict=True)]
                line += f"   {min(ratios):.2f}-{max(ratios):.2f}  "
        print(line)


def compared(first: Path, second: Path) -> str:
    """How far two folders' weights are apart, tensor by tensor."""
    from components.merge_adapter.weights import Weights

    same = total = 0
    worst = 0.0
    with Weights(first) as ours, Weights(second) as theirs:
        for name in ours.names:
            a, b = ours.tensor(name), theirs.tensor(name)
            same, total = same + int((a == b).sum()), total + a.numel()
            # In units of a bf16 number's last place, 2**-8 of it.
            apart = (a.float() - b.float()).abs_().div_(b.float().abs_().clamp_(min=2**-20)).max()
            worst = max(worst, float(apart) * 2**7)
    return (
        f"original and peft: {same / total:.4%} of the weights are the same bits, "
        f"none differs by more than {worst:.1f} units in the last place"
    )


if __name__ == "__main__":
    main()
