"""Evaluating and merging hold one form of the model at a time: contestants, candidates, exports follow each other."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.lm import chat, loading

# Beside the form: activations, a layer in two precisions, and what libraries allocate when they are first used.
CONSTANT_BYTES = 48 * 2**20

PROGRAM = """
import json, sys
from pathlib import Path
import bitsandbytes.nn, gguf, peft.tuners.lora, scipy.linalg, transformers.models.llama.modeling_llama
from components.evaluate.step import run as evaluate
from components.merge_adapter import gguf_file
from components.merge_adapter.step import run as merge
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.lm import chat

work = Path(sys.argv[1])
inputs = {name: work / name for name in ("dataset", "base_model", "base_nf4", "adapter")}
evaluation, model = work / "evaluation", work / "merged" / "model"
rules = EvaluateConfig(allow_first_release=True, bootstrap_samples=200, device="cpu", intruder_top_k=2, stop_rows=1,
                       max_new_tokens=8)
exports = ["bf16", "gguf-f16"]

def wait(name):
    print(name, flush=True)
    sys.stdin.readline()

wait("ready")
evaluate(rules, **inputs, champion=work / "champion", anchor=None, golden_data=None, reference_data=None,
         evaluation=evaluation)
wait("evaluated")
merge(MergeConfig(device="cpu", base="measured", exports=exports), **inputs, evaluation=evaluation,
      reference_data=None, model=model)
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
def work(tiny_model: Path, write_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 35 million weights, its 4-bit form, an adapter that changes nothing, a few rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("one-form")
    tokenizer = chat.load_tokenizer(tiny_model).tokenizer
    settings = LlamaConfig.from_pretrained(tiny_model).to_dict()
    settings |= {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "head_dim": 128}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16).save_pretrained(folder / "base_model")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = loading.load_base(folder / "base_model", quantization=nf4)
    model.save_pretrained(folder / "base_nf4")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    for name in ("base_model", "base_nf4"):
        tokenizer.save_pretrained(folder / name)
    write_dataset(folder / "dataset", rows=6)
    (folder / "champion").mkdir()
    (folder / "champion/model").symlink_to(folder / "base_model")
    (folder / "evaluation").mkdir()
    (folder / "merged/model").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def peaks(work: Path) -> dict[str, int]:
    """The anonymous memory of each step above what the process had before it, in bytes."""
    command = [sys.executable, "-c", PROGRAM, str(work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        samples: list[int] = []

        def sample() -> None:
            # 500 samples a second: a peak between two of them would have to be very short.
            while process.poll() is None:
                samples.append(anonymous_bytes(process.pid))
                time.sleep(0.002)

        before, peaks = 0, {}
        threading.Thread(target=sample, daemon=True).start()
        for step, mark in (("start", "ready\n"), ("evaluate", "evaluated\n"), ("merge", "")):
            while process.stdout.readline() not in (mark, ""):
                pass
            before = before or anonymous_bytes(process.pid)
            peaks[step] = max(samples, default=0) - before
            samples.clear()
            if mark:
                process.stdin.write("go on\n")
                process.stdin.flush()
    assert process.returncode == 0
    return peaks


@pytest.mark.slow
@pytest.mark.parametrize("step", ["evaluate", "merge"])
def test_a_step_holds_one_form(work: Path, peaks: dict[str, int], step: str) -> None:
    form_bytes = 2 * (work / "base_model/model.safetensors").stat().st_size  # in fp32, from a file in 16 bits
    assert form_bytes > 120 * 2**20, form_bytes
    assert form_bytes < peaks[step] < 1.2 * form_bytes + CONSTANT_BYTES < 1.6 * form_bytes


@pytest.mark.slow
def test_the_certificate_says_on_how_many_tokens_kl_and_agreement_rest(work: Path, peaks: dict[str, int]) -> None:
    model = work / "merged/model"
    document = json.loads((model / "certificate.json").read_text())
    compared = document["compared_positions"]
    assert compared["compared"] == compared["of"] > 0
    assert (
        f"rest on {compared['of']} of {compared['of']} supervised tokens (all)" in (model / "report.html").read_text()
    )
    # The file of logits is no part of the artifact, and nothing is left of it.
    assert [path.name for path in (work / "merged").iterdir()] == ["model"]
