"""The models and the rows of the benchmark on a GPU: what its arithmetic counts, and that a deep model is a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import gpu_models
from qlora_retrain.lm import loading


def test_the_necessary_arithmetic_is_what_torch_counts() -> None:
    """Over one row with frozen weights, of which torch also computes the half of attention that nobody sees."""
    length, supervised, shape = 24, 9, gpu_models.SHAPES["tiny"]
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager")).requires_grad_(False)
    hidden = torch.randn(1, length, shape["hidden_size"], requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        # The first layer's input has a gradient here, as every other layer's has in training.
        states = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        model.lm_head(states[0, :supervised]).sum().backward()
    counted = {str(operation): flop for operation, flop in counter.get_flop_counts()["Global"].items()}
    attention = counted.pop("aten.bmm")
    expected = gpu_models.necessary_flop("tiny", [length], supervised)
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    assert attention == 12 * layers * width * length * length
    # Rotary embeddings are a product too, for transformers.
    assert sum(counted.values()) + attention / 2 == pytest.approx(expected, rel=0.01)


def test_the_sizes_are_those_that_the_models_are_known_for() -> None:
    billions = {shape: gpu_models.layer_weights(shape) / 1e9 for shape in gpu_models.SHAPES}
    assert billions == pytest.approx({"tiny": 7.4e-5, "1b": 0.973, "8b": 6.98, "33b": 32.1, "70b": 68.5}, rel=0.01)


def test_a_model_written_from_one_layer_loads_with_every_layer(tmp_path: Path) -> None:
    gpu_models.make_model("tiny", tmp_path / "tiny", "cpu")
    model = loading.load_nf4(tmp_path / "tiny", dtype="bfloat16")
    assert len(model.model.layers) == gpu_models.SHAPES["tiny"]["num_hidden_layers"]
    rows = gpu_models.new_rows("tiny", "chat", 50)
    lengths = [len(row["input_ids"]) for row in rows]
    assert 150 < sum(lengths) / 50 < 250
    assert [len(row["input_ids"]) for row in gpu_models.new_rows("tiny", "512", 2)] == [512, 512]
    with torch.no_grad():
        assert model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits.isfinite().all()


def test_a_plans_prediction_stands_beside_our_jobs() -> None:
    """70B in 48 GB, 33B in 24 and 8B in 8, as `make gpu-check-large` tries it."""

    def predicted(shape: str, rows: str, size: int, name: str) -> float:
        job = {"name": name, "shape": shape, "rows": rows, "micro_batch_size": size, "accumulation": 1, "steps": 5}
        return gpu_models.predicted_gib({**job, "optimizer": "paged_adamw_8bit", "device": "cuda"})

    for shape, limit_gib in {"70b": 48, "33b": 24, "8b": 8}.items():
        assert gpu_models.weights_gib(shape) < predicted(shape, "512", 1, "ours, checkpointing") < limit_gib
    assert predicted("8b", "2048", 4, "ours, liger, checkpointing") < predicted("8b", "2048", 4, "ours, liger") / 2
