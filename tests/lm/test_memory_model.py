"""The arithmetic of a training step's memory: what each setting changes, and which micro-batch fits."""

from __future__ import annotations

import dataclasses

import pytest

from components.train_qlora import loss, padded_rows
from qlora_retrain.config.sections import QuantizeConfig, TrainConfig
from qlora_retrain.lm import base_formats, memory_model, step_memory
from qlora_retrain.lm.base_formats import FourBits
from qlora_retrain.lm.memory_model import MicroBatch, Settings, estimate, largest_micro_batch
from qlora_retrain.lm.model_shape import ModelShape

LLAMA_7B = ModelShape.from_config(
    {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "hidden_act": "silu", "tie_word_embeddings": False,
    }
)  # fmt: skip
BATCH = MicroBatch(rows=4, longest=512)
SECTIONS = {
    "train": TrainConfig(device="cuda", precision="bfloat16", attention="sdpa", kernels="torch").model_dump(),
    "quantize": QuantizeConfig().model_dump(),
}


def test_the_adapter_of_the_common_shape_has_the_size_that_is_known() -> None:
    """Rank 16 on all linear layers of a 7B model: 40.0 million weights, each of 16 bytes with gradient and moments."""
    memory = estimate(LLAMA_7B, Settings(rank=16, accumulates=True), BATCH)
    assert memory.adapter == 4 * 39_976_960
    assert memory.adapter + memory.gradients + memory.optimizer == 16 * 39_976_960
    # Twice the rank, twice of all of them.
    assert estimate(LLAMA_7B, Settings(rank=32), BATCH).optimizer == 2 * memory.optimizer


def test_weights_have_the_bits_of_the_paper() -> None:
    """4.127 bits with double quantization, 4.5 without (arXiv 2305.14314); embeddings and head in 16 bits."""
    sixteen_bits = 2 * (LLAMA_7B.embedding_weights + LLAMA_7B.norm_weights)
    for double_quant, bits in ((True, 4.127), (False, 4.5)):
        packed = (
            memory_model.weight_bytes(LLAMA_7B, Settings(base_format=FourBits("nf4", double_quant, "bfloat16")))
            - sixteen_bits
        )
        assert 8 * packed / LLAMA_7B.layer_weights == pytest.approx(bits, abs=1e-3)
    for settings, bits in (
        ({"format": "nf4-shifted"}, 4.254),  # a scale and a constant of 8 bits for 64 weights (arXiv 2402.05445)
        ({"format": "mixed"}, 5.0),
        ({"format": "mixed", "bits_per_weight": 6.5}, 6.5),
    ):
        base_format = base_formats.from_settings(QuantizeConfig(**settings).model_dump())
        size_bytes = memory_model.weight_bytes(LLAMA_7B, Settings(base_format=base_format)) - sixteen_bits
        assert 8 * size_bytes / LLAMA_7B.layer_weights == pytest.approx(bits, abs=1e-3)
        # Every process of FSDP has all scales, and the constants.
        numbers = 2 if settings["format"] == "nf4-shifted" else 1
        assert bits - base_format.code_bits_per_weight == pytest.approx(numbers * 0.127, abs=1e-3)
    assert memory_model.weight_bytes(LLAMA_7B, Settings(precision="float32")) == 4 * LLAMA_7B.weights
    sharded = memory_model.weight_bytes(LLAMA_7B, Settings(num_processes=4, is_sharded=True)) - sixteen_bits
    assert packed / 4 < sharded < packed / 2


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("optimizer", {"optimizer_bits": 8}),
        ("activations", {"checkpoint_every": 1}),
        ("activations", {"dropout": 0.0}),
        ("adapter", {"target_modules": "attention"}),
        ("adapter", {"rank": 8}),
    ],
)
def test_each_saving_setting_saves_where_it_should(part: str, change: dict[str, object]) -> None:
    settings = Settings(accumulates=True)
    before, after = (estimate(LLAMA_7B, s, BATCH) for s in (settings, dataclasses.replace(settings, **change)))
    assert getattr(after, part) < getattr(before, part)
    assert after.total < before.total


def test_a_method_costs_what_it_keeps() -> None:
    lora, dora, adalora, lora_xs, qa_lora, ir_qlora = (
        estimate(LLAMA_7B, Settings.from_sections(SECTIONS["train"] | {"method": m}, SECTIONS["quantize"]), BATCH)
        for m in ("lora", "dora", "adalora", "lora-xs", "qa-lora", "ir-qlora")
    )
    assert ir_qlora.adapter == lora.adapter + 4 * 2 * 7 * 32  # two factors a layer
    # DoRA: a magnitude of each output, and every output before its rows are scaled.
    outputs = 32 * (4 * 4096 + 2 * 11008 + 4096)
    assert dora.adapter - lora.adapter == 4 * outputs
    assert dora.activations - lora.activations == 2 * 4 * 512 * outputs
    # AdaLoRA: half as much again of the rank, and two averages of every number.
    assert adalora.adapter == 3 * 1.5 * lora.adapter
    assert adalora.optimizer == 1.5 * lora.optimizer
    # LoRA-XS: 16 x 16 numbers in each of seven layers of a block.
    assert lora_xs.optimizer == 8 * 32 * 7 * 256
    # QA-LoRA: A has one input for each 32.
    inputs = 32 * (6 * 4096 + 11008)
    assert lora.optimizer - qa_lora.optimizer == 8 * 16 * inputs * 31 / 32
    assert lora_xs.adapter == lora.adapter + 4 * 32 * 7 * 256


def test_recomputing_every_second_layer_lies_between_all_and_none() -> None:
    totals = [estimate(LLAMA_7B, Settings(checkpoint_every=every), MicroBatch(8, 2048)).total for every in (1, 2, 4, 0)]
    assert totals == sorted(totals)
    # All layers recomputed leave one input of each, which is a small part of what it would keep.
    assert totals[0] < totals[-1] / 4


def test_the_parts_add_up_and_grow_with_rows_length_and_supervised_tokens() -> None:
    memory = estimate(LLAMA_7B, Settings(), BATCH)
    assert sum(memory.parts().values()) == memory.total
    for larger in (MicroBatch(5, 512), MicroBatch(4, 513), MicroBatch(4, 512, tokens=4 * 512)):
        assert estimate(LLAMA_7B, Settings(), larger).total >= memory.total
    fewer_tokens = estimate(LLAMA_7B, Settings(), MicroBatch(4, 512, tokens=600))
    assert fewer_tokens.activations < memory.activations / 3


@pytest.mark.parametrize("memory_gib", [4.0, 6.0, 16.0, 24.0, 80.0])
def test_the_largest_micro_batch_fits_and_one_row_beyond_it_does_not(memory_gib: float) -> None:
    settings, memory_bytes = Settings(checkpoint_every=1), round(memory_gib * 2**30)
    rows = largest_micro_batch(LLAMA_7B, settings, memory_bytes, longest=1024, tokens_per_row=None, limit=64)
    assert rows == 0 or estimate(LLAMA_7B, settings, MicroBatch(rows, 1024)).total <= memory_bytes
    assert rows == 64 or estimate(LLAMA_7B, settings, MicroBatch(rows + 1, 1024)).total > memory_bytes
    # Rows that are shorter than the longest leave room for others.
    short = largest_micro_batch(LLAMA_7B, settings, memory_bytes, longest=1024, tokens_per_row=256.0, limit=64)
    assert short >= rows


@pytest.mark.parametrize(
    ("sizes", "limit_gb", "fits"),
    [((4096, 11008, 32), 6, True), ((5120, 13824, 40), 10, True), ((6656, 17920, 60), 24, True),
     ((8192, 22016, 80), 48, True), ((8192, 22016, 80), 36, False)],
    ids=["7B in 6", "13B in 10", "33B in 24", "65B in 48", "65B not in 36"],
)  # fmt: skip
def test_the_claims_of_the_papers_hold_for_a_short_row(sizes: tuple[int, int, int], limit_gb: int, fits: bool) -> None:
    """Those of arXiv 2305.14314 and of summaries; docs/planning.md has the table. With 0.7 GB for CUDA."""
    width, mlp_width, layers = sizes
    config = {"hidden_size": width, "intermediate_size": mlp_width, "num_hidden_layers": layers, "vocab_size": 32000}
    shape = ModelShape.from_config({"model_type": "llama", "num_attention_heads": width // 128, **config})
    settings = Settings(optimizer_bits=8, checkpoint_every=1)
    assert (estimate(shape, settings, MicroBatch(1, 512)).total / 1e9 + 0.7 < limit_gb) == fits


def test_chunks_of_logits_are_those_of_the_training_step() -> None:
    assert step_memory.LOSS_CHUNK_BYTES == loss.CHUNK_BYTES
    assert step_memory.LOSS_BLOCK_BYTES == loss.BLOCK_BYTES
    assert step_memory.ATTENTION_BLOCK == padded_rows.BLOCK_LENGTH
