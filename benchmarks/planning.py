"""Compare the memory that a plan predicts for a training step with what torch allocates for it, on the CPU.

Models of several families and shapes with random weights, quantized to 4 bits; rows of random tokens. Weights, adapter
and optimizer are counted; the peak of a forward and backward pass is taken from torch's own record of every
allocation, so the machine's speed and its allocator do not matter.

    python benchmarks/planning.py            the table of docs/planning.md; about five minutes
    python benchmarks/planning.py --only qwen3 gemma3
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_retrain.lm import memory_model
from qlora_retrain.lm.memory_model import Memory, MicroBatch, Settings
from qlora_retrain.lm.model_shape import ModelShape

LLAMA = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
# By name: what differs from LLAMA.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "deep": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 16, "num_key_value_heads": 8},
    "wide": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2},
    "vocabulary": {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 131072},
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "num_hidden_layers": 3},
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "num_hidden_layers": 3},
    "gemma": {"model_type": "gemma", "head_dim": 64, "hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 3},
    "gemma3": {
        "model_type": "gemma3_text", "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64,
    },
    "starcoder2": {"model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 3},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A step to measure.

    Attributes:
        shape: A name in `SHAPES`.
        rows: The rows of a micro-batch.
        length: The tokens of each.
        supervised_fraction: The part of a row, at its end, with a loss.
        settings: Fields of the section `train` that differ from its defaults.
        base_format: The base's: `quantize.format`.
    """

    shape: str
    rows: int = 8
    length: int = 200
    supervised_fraction: float = 0.25
    settings: dict[str, Any] = field(default_factory=dict)
    base_format: str = "nf4"

    @property
    def label(self) -> str:
        """The case in a few words."""
        settings = "".join(f", {name} {value}" for name, value in self.settings.items())
        settings += f", format {self.base_format}" if self.base_format != "nf4" else ""
        return f"{self.shape}, {self.rows} x {self.length}, {self.supervised_fraction:.0%} supervised{settings}"


# `alpha` is of an adapter.
FULL: dict[str, Any] = {"method": "full", "alpha": None, "optimizer": "paged_adamw_8bit"}
GRID = (
    Case("llama"),
    Case("llama", supervised_fraction=1.0),
    Case("llama", rows=32, length=50),
    Case("llama", rows=2, length=1000),
    Case("llama", settings={"gradient_checkpointing": 1}),
    Case("llama", settings={"gradient_checkpointing": 2}),
    Case("llama", settings={"rank": 128, "dropout": 0.0}),
    Case("llama", settings={"rank": 128, "optimizer": "paged_adamw_8bit"}),
    Case("llama", settings={"target_modules": "attention"}),
    Case("llama", settings={"target_modules": ["q_proj", "v_proj"], "dropout": 0.2}),
    Case("llama", settings={"precision": "float32"}),
    Case("llama", settings={"attention": "sdpa"}),
    Case("llama", base_format="none"),
    Case("llama", settings=FULL, base_format="none"),
    Case("llama", settings=FULL | {"gradient_checkpointing": 1}, base_format="none"),
    Case("llama", settings=FULL | {"precision": "float32"}, base_format="none"),
    Case("deep", settings=FULL, base_format="none"),
    Case("qwen3", settings=FULL, base_format="none"),
    Case("vocabulary", rows=16, length=60, settings=FULL, base_format="none"),
    Case("deep"),
    Case("deep", settings={"gradient_checkpointing": 1}),
    Case("wide", rows=4),
    Case("vocabulary", rows=16, length=60),
    Case("qwen3"),
    Case("phi3"),
    Case("gemma"),
    Case("gemma3"),
    Case("starcoder2"),
)


def stored_base(case: Case, folder: Path) -> Path:
    """Write a model of the case's shape with random weights, in its format, to the folder; return its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from components.quantize_model.step import run as quantize
    from qlora_retrain.config.sections import QuantizeConfig

    base, base_nf4 = folder / f"{case.shape}-base", folder / f"{case.shape}-{case.base_format}"
    if not base.is_dir():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**LLAMA, **SHAPES[case.shape]}))
        model.to(torch.bfloat16).save_pretrained(base)
        del model
    if not base_nf4.is_dir():
        base_nf4.mkdir()
        quantize(QuantizeConfig(format=case.base_format), base, base_nf4)  # type: ignore[arg-type]
    return base_nf4


def predict(case: Case) -> Memory:
    """Return the prediction for a case, from the fields of its config.json and of its settings alone."""
    from qlora_retrain.config.sections import QuantizeConfig

    tokens = case.rows * case.length
    supervised = round(case.supervised_fraction * case.length) * case.rows
    return memory_model.estimate(
        ModelShape.from_config({**LLAMA, **SHAPES[case.shape]}),
        Settings.from_sections(_train_config(case).model_dump(), QuantizeConfig(format=case.base_format).model_dump()),  # type: ignore[arg-type]
        MicroBatch(case.rows, case.length, tokens, supervised),
    )


def measure(case: Case, base_nf4: Path) -> dict[str, int]:
    """Return what a step of the case takes, in bytes: weights, adapter, optimizer, and the peak of the pass."""
    import torch

    from components.train_qlora import adapter, loss, packing
    from components.train_qlora.data import PaddingCollator
    from components.train_qlora.optimizer import MASTER_PART, AdapterOptimizer
    from qlora_retrain.lm import loading

    config = _train_config(case)
    base = loading.load_nf4(base_nf4, attn_implementation=config.attention, dtype=config.precision)
    torch.manual_seed(0)
    model = adapter.attach_new(base, config).train()
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    tokens = torch.randint(3, model.config.vocab_size, (case.rows, case.length)).tolist()
    unsupervised = case.length - round(case.supervised_fraction * case.length)
    rows = [{"input_ids": row, "labels": [-100] * unsupervised + row[unsupervised:]} for row in tokens]
    batch = PaddingCollator(0)(rows)
    optimizer = AdapterOptimizer(config, trainable.items())
    optimizer.begin()
    is_full, gradients = config.method == "full", 0
    with packing.packed_attention(model):  # also around backward, which recomputes layers
        if is_full:  # the planner counts all gradients, as an earlier micro-batch leaves them
            loss.summed_loss(model, batch).backward()
            gradients = sum(weight.grad.nbytes for weight in optimizer.parameters.values() if weight.grad is not None)
        peak = allocated_peak(lambda: loss.summed_loss(model, batch).backward())
    optimizer.step(1e-4)
    sizes = {name: tensor.nbytes for name, tensor in optimizer.state().items()}
    masters = sum(size for name, size in sizes.items() if name.endswith(f".{MASTER_PART}"))
    trained = sum(weight.nbytes for weight in trainable.values())
    return {
        "weights": trained if is_full else _frozen_bytes(model),
        "adapter": masters if is_full else trained,
        "gradients": gradients,
        "optimizer": sum(sizes.values()) - masters,
        "step": peak,
    }


def allocated_peak(function: Any) -> int:
    """Return the most bytes that torch had allocated on the CPU at a time inside a function, beside those before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    size = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            size += event.nbytes()
            peak = max(peak, size)
    return peak


def _train_config(case: Case) -> Any:
    from qlora_retrain.config.sections import TrainConfig

    settings = {"attention": "eager", "precision": "bfloat16", "kernels": "torch", "alpha": 32.0} | case.settings
    return TrainConfig(device="cpu", micro_batch_size=case.rows, global_batch_size=case.rows, **settings)


def _frozen_bytes(model: Any) -> int:
    """Return the bytes of the frozen weights with the constants of their quantization."""
    weights = [weight for weight in model.parameters() if not weight.requires_grad]
    storages = {weight.data_ptr(): weight.nbytes for weight in weights}
    states = [state for weight in weights if (state := getattr(weight, "quant_state", None)) is not None]
    scales = [scale for state in states for scale in (state.absmax, state.state2 and state.state2.absmax)]
    return sum(storages.values()) + sum(scale.nbytes for scale in scales if scale is not None)


def main() -> None:
    """Measure every case, and print predicted beside measured."""
    import warnings

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=sorted(SHAPES))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print("| step | predicted | measured | error |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case in GRID:
            if options.only and case.shape not in options.only:
                continue
            measured, predicted = measure(case, stored_base(case, Path(folder))), predict(case)
            total = sum(measured.values())
            error = predicted.total / total - 1
            print(
                f"| {case.label} | {predicted.total / 2**20:.0f} MiB | {total / 2**20:.0f} MiB | {error:+.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
