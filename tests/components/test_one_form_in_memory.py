"""Evaluating and merging hold one form of the model at a time: contestants, candidates, exports follow each other."""

from __future__ import annotations

import functools
import gc
import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.evaluate.step import run as evaluate
from components.merge_adapter.step import run as merge
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.lm import chat, loading, memory

EVALUATE = EvaluateConfig(
    allow_first_release=True,
    bootstrap_samples=200,
    device="cpu",
    intruder_top_k=2,
    stop_rows=1,
    max_new_tokens=8,
)
MERGE = MergeConfig(device="cpu", base="measured", rank="smallest", exports=["bf16", "nf4", "gguf-f16"])
INPUTS = ("dataset", "base_model", "base_nf4", "adapter")

# Beside the form: activations, a layer in two precisions, and what libraries allocate when they are first used. It
# differs by the processor and by the order of threads: 25 to 95 MiB were seen.
CONSTANT_BYTES = 160 * 2**20

PROGRAM = """
import sys
from pathlib import Path
import bitsandbytes.nn, gguf, peft.tuners.lora, scipy.linalg, transformers.models.llama.modeling_llama
from components.merge_adapter import gguf_file
from tests.components.test_one_form_in_memory import evaluate_folder, merge_folder

def wait(name):
    print(name, flush=True)
    sys.stdin.readline()

wait("ready")
evaluate_folder(Path(sys.argv[1]))
wait("evaluated")
merge_folder(Path(sys.argv[1]))
"""


def evaluate_folder(work: Path) -> None:
    inputs = {name: work / name for name in INPUTS}
    evaluate(
        EVALUATE,
        **inputs,
        champion=work / "champion",
        anchor=None,
        golden_data=None,
        reference_data=None,
        evaluation=work / "evaluation",
    )


def merge_folder(work: Path) -> None:
    inputs = {name: work / name for name in INPUTS}
    merge(MERGE, **inputs, evaluation=work / "evaluation", reference_data=None, model=work / "merged/model")


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous resident memory of a process; 0 where it has ended."""
    # RssAnon and not RSS: the pages of mapped files count in RSS, and the system can drop them at any time.
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


MakeWork = Callable[..., Path]


@pytest.fixture(scope="module")
def make_work(
    tiny_model: Path, write_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> MakeWork:
    """Make the inputs of a line: a random model, its 4-bit form, an adapter that changes nothing, a few rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    def make(**sizes: int) -> Path:
        folder = tmp_path_factory.mktemp("one-form")
        tokenizer = chat.load_tokenizer(tiny_model).tokenizer
        settings = LlamaConfig.from_pretrained(tiny_model).to_dict() | sizes
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

    return make


@pytest.fixture(scope="module")
def work(make_work: MakeWork) -> Path:
    """A line whose model has 5 million weights."""
    return make_work(hidden_size=256, intermediate_size=704, num_hidden_layers=6, head_dim=64)


def form_bytes(work: Path) -> int:
    return 2 * (work / "base_model/model.safetensors").stat().st_size  # in fp32, from a file in 16 bits


@pytest.fixture(scope="module")
def loads(work: Path) -> dict[str, list[int]]:
    """For each step and each model that it loads, the bytes of all tensors that lived at the beginning of the load."""
    import torch

    loads: dict[str, list[int]] = {"evaluate": [], "merge": []}

    def count(step: str) -> None:
        memory.release_dropped_models()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some objects warn when they are asked for their class
            tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
        loads[step].append(sum(storages.values()))

    with pytest.MonkeyPatch.context() as patch:
        for step, run in (("evaluate", evaluate_folder), ("merge", merge_folder)):
            # Where loading calls it, and not where a form is dequantized in place.
            patch.setattr(loading, "memory", SimpleNamespace(release_dropped_models=functools.partial(count, step)))
            run(work)
    return loads


@pytest.mark.slow
@pytest.mark.parametrize(("step", "models"), [("evaluate", 3), ("merge", 8)])
def test_no_form_lives_when_the_next_one_is_loaded(
    work: Path, loads: dict[str, list[int]], step: str, models: int
) -> None:
    assert len(loads[step]) >= models
    assert max(loads[step]) < min(loads[step]) + 0.1 * form_bytes(work), loads[step]


@pytest.fixture(scope="module")
def large_work(make_work: MakeWork) -> Path:
    """A line whose model has 140 million weights."""
    return make_work(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, head_dim=128)


@pytest.fixture(scope="module")
def peaks(large_work: Path) -> dict[str, int]:
    """The anonymous memory of each step above what the process had before it, in bytes."""
    command = [sys.executable, "-c", PROGRAM, str(large_work)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
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


@pytest.mark.soak
@pytest.mark.parametrize("step", ["evaluate", "merge"])
def test_a_step_holds_one_form(large_work: Path, peaks: dict[str, int], step: str) -> None:
    form = form_bytes(large_work)
    # Two forms would be 2 and more.
    assert form < peaks[step] < 1.2 * form + CONSTANT_BYTES < 1.6 * form


@pytest.mark.slow
def test_the_certificate_says_on_how_many_tokens_kl_and_agreement_rest(work: Path, loads: dict[str, list[int]]) -> None:
    model = work / "merged/model"
    document = json.loads((model / "certificate.json").read_text())
    compared = document["compared_positions"]
    assert compared["compared"] == compared["of"] > 0
    assert (
        f"rest on {compared['of']} of {compared['of']} supervised tokens (all)" in (model / "report.html").read_text()
    )
    # The file of logits is no part of the artifact, and nothing is left of it.
    assert [path.name for path in (work / "merged").iterdir()] == ["model"]
