"""The memory of a merge does not grow with the model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SIDE = 2048
LAYERS = 32

PROGRAM = """
import sys
from pathlib import Path
import bitsandbytes.functional
from components.merge_adapter.merge import merge
print("ready", flush=True)
sys.stdin.readline()
base, nf4, adapter, out = map(Path, sys.argv[1:5])
merge(base, nf4, adapter, out, dequantized=sys.argv[5] == "dequantized", max_shard_gib=0.05)
"""


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous resident memory of a process; 0 where it has ended."""
    # RssAnon and not RSS: the pages of mapped files count in RSS, and the system can drop them at any time.
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base of 256 MiB in shards, its 4-bit form and an adapter; random numbers."""
    from bitsandbytes.functional import quantize_4bit

    work = tmp_path_factory.mktemp("large")
    for name in ("base", "nf4", "adapter"):
        (work / name).mkdir()

    names = [f"model.layers.{i}.mlp.up_proj" for i in range(LAYERS)]
    torch.manual_seed(0)
    adapter, index = {}, {}
    for i, name in enumerate(names):
        weight = torch.empty(SIDE, SIDE, dtype=torch.bfloat16).normal_()
        file = f"model-{i}.safetensors"
        save_file({f"{name}.weight": weight}, work / "base" / file)
        index[f"{name}.weight"] = file

        # As bitsandbytes stores a model: the codes under the weight's name, the scales and tables beside them.
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        parts = {f"{name}.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        save_file({f"{name}.weight": packed, **parts}, work / "nf4" / file)
        adapter[f"base_model.model.{name}.lora_A.weight"] = torch.empty(8, SIDE).normal_(std=0.02)
        adapter[f"base_model.model.{name}.lora_B.weight"] = torch.empty(SIDE, 8).normal_(std=0.02)

    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    (work / "base/config.json").write_text("{}")
    (work / "nf4/config.json").write_text(json.dumps({"quantization_config": quantization}))
    (work / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (work / "nf4/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file(adapter, work / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    (work / "adapter/adapter_config.json").write_text(json.dumps(config))
    return [str(work / name) for name in ("base", "nf4", "adapter")]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_a_merge_holds_a_few_tensors_however_large_the_model(folders: list[str], tmp_path: Path, base: str) -> None:
    command = [sys.executable, "-c", PROGRAM, *folders, str(tmp_path), base]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous_bytes(process.pid)

        # 500 samples a second: a peak between two of them would have to be very short.
        process.stdin.write("go\n")
        process.stdin.close()
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.002)
    assert process.returncode == 0
    output_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert output_bytes > 2 * LAYERS * SIDE * SIDE

    # Four times the largest tensor in fp32, which is a quarter of the model: a model in memory would be noticed.
    assert 0 < peak - before < 4 * 4 * SIDE * SIDE < output_bytes / 3
