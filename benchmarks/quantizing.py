"""Measure the time and memory of quantizing a model, beside transformers' own way.

    transformers   `from_pretrained(quantization_config=...)` and `save_pretrained`
    stream         what the step `quantize_model` does of that: load tensor by tensor, and save
    step           the whole step: also the error of every layer, the checks, and loading what was saved

Each runs in a process of its own, with as many threads as torch takes (OMP_NUM_THREADS). The models have the shapes of
Llama 3.2 1B and 3B and of Llama 3.1 8B, and random bf16 weights; or a folder is given. Time is without imports. CPU
time is the process's, since other programs may share the machine. Memory is the process's anonymous memory (RssAnon,
read 50 times a second), less what it had after the imports: the system drops the pages of mapped files when it needs
room. Equal: the weights' files have the bytes of transformers' files.

Command: `python benchmarks/quantizing.py --shapes 1b 3b [--contestants transformers stream step] [--base FOLDER]`.
Disk, in `--work`: the model, which stays for the next run, and twice its 4-bit form.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
UNTIED = ("8b",)
CONTESTANTS = ("transformers", "stream", "step")
SHARD_BYTES = 2 << 30  # of the model that is written, so that few of its tensors are in memory at once
RANDOM_NUMBERS = 1 << 24
PREFIX = "benchmark: "  # of a contestant's own lines, between those of the step


def main() -> None:
    """Print one line per model and contestant."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=[])
    parser.add_argument("--base", type=Path, nargs="*", default=[], help="folders of 16-bit models")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "quantizing")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        contestant, base, folder = options.child
        return run_contestant(contestant, Path(base), Path(folder))

    print("model        weights  contestant    wall, s   CPU, s   M weights/CPU s   peak, MiB   largest, MiB   equal")
    for base in [write_model(options.work / shape, shape) for shape in options.shapes] + options.base:
        compare(base, options)


def write_model(folder: Path, shape: str) -> Path:
    """Write a model with random weights shard by shard, unless it is there; return its folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    if (folder / "config.json").is_file():
        return folder
    config = LlamaConfig(
        **SHAPES[shape], num_key_value_heads=2 if shape == "tiny" else 8, tie_word_embeddings=shape not in UNTIED,
        vocab_size=512 if shape == "tiny" else 128_256, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = (torch.randn(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    # Names and shapes first, then one shard after another.
    shards: list[dict[str, torch.Size]] = [{}]
    shard_bytes = 0
    for name, parameter in model.named_parameters():
        if shard_bytes + parameter.nbytes > SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = parameter.shape
        shard_bytes += parameter.nbytes
    weight_map = {}
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: numbers.repeat(-(-size.numel() // RANDOM_NUMBERS))[: size.numel()].view(size).clone()
            for name, size in shard.items()
        }
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return folder


def compare(base: Path, options: argparse.Namespace) -> None:
    """Run every contestant on a model, print what it took, and compare the written weights."""
    from safetensors import safe_open

    from qlora_retrain.lm.model_files import weight_paths

    sizes = []
    for path in weight_paths(base):
        with safe_open(path, "pt") as file:
            sizes += [file.get_tensor(name).numel() for name in file.keys()]  # noqa: SIM118
    hashes: dict[str, list[str]] = {}
    for contestant in options.contestants:
        folder = options.work / f"{base.name}-{contestant}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        result = measure([sys.executable, __file__, "--child", contestant, str(base), str(folder)])
        hashes[contestant] = [hash_file(path) for path in sorted(folder.glob("*.safetensors"))]
        shutil.rmtree(folder)

        equal = "" if "transformers" not in hashes else str(hashes[contestant] == hashes["transformers"])
        print(
            f"{base.name:12} {sum(sizes) / 1e9:5.2f} G  {contestant:12} {result['wall_seconds']:8.1f} "
            f"{result['cpu_seconds']:8.1f} {sum(sizes) / 1e6 / result['cpu_seconds']:17.1f} "
            f"{result['peak_bytes'] / 2**20:11.0f} {2 * max(sizes) / 2**20:14.0f}   {equal}",
            flush=True,
        )


def measure(command: list[str]) -> dict[str, float]:
    """Run a command that prints one JSON line when it starts and one when it ends; add its peak of anonymous memory."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    before = peak = 0

    def sample() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.02)

    thread = threading.Thread(target=sample)
    for line in process.stdout:
        if line.startswith(PREFIX):
            lines.append(json.loads(line.removeprefix(PREFIX)))
        if len(lines) == 1 and not thread.is_alive():
            before = anonymous_bytes(process.pid)
            thread.start()
    if process.wait() or len(lines) != 2:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    thread.join()
    return {**lines[1], "peak_bytes": peak - before}


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous resident memory of a process; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def run_contestant(contestant: str, base: Path, folder: Path) -> None:
    """Quantize one model in this process; print its seconds."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from components.quantize_model.step import SHARD_SIZE, run
    from qlora_retrain.config.sections import QuantizeConfig
    from qlora_retrain.lm import loading
    from qlora_retrain.lm.streaming_quantizer import load_quantized

    loading.silence_transformers()
    print(PREFIX + json.dumps({"threads": torch.get_num_threads()}), flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wall, cpu = time.perf_counter(), sum(os.times()[:2])
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    if contestant == "step":
        run(QuantizeConfig(), base, folder)
    elif contestant == "stream":
        model = load_quantized(base, settings, folder, device=device, dtype="bfloat16")
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, quantization_config=settings, device_map=device
        )
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    seconds = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": sum(os.times()[:2]) - cpu}
    print(PREFIX + json.dumps(seconds), flush=True)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
