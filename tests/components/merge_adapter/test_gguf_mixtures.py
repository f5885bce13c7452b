"""The mixtures q4_k_m and q5_k_m: the types that llama.cpp chooses, its own quantizer, and what lacks it."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from components.merge_adapter import gguf_blocks, gguf_file, gguf_types
from components.merge_adapter.step import run
from qlora_retrain.config.sections import MergeConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import gguf_mixtures, loading
from tests.components.merge_adapter import llama_cpp
from tests.components.merge_adapter.test_gguf_families import random_ids, write_random_model

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
LAYERS_WITH_MORE_BITS = {0, 3, 6, 8, 9}  # of 10, as `llama_model_quantize` (llama.cpp, 2026-10) wrote such a model


@pytest.mark.parametrize(
    ("export_type", "few", "many"), [("gguf-q4_k_m", Type.Q4_K, Type.Q6_K), ("gguf-q5_k_m", Type.Q5_K, Type.Q6_K)]
)
def test_the_types_are_those_of_llama_cpps_quantizer(export_type: str, few: Type, many: Type) -> None:
    layer_names = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.{i}.{name}.weight": (512, 256) for i in range(10) for name in layer_names}
    shapes |= {"token_embd.weight": (512, 256), "output.weight": (512, 256), "output_norm.weight": (256,)}
    types = gguf_types.choose(shapes, export_type, 10)
    assert types.fallbacks == ()
    for i in range(10):
        for name in layer_names:
            is_rich = i in LAYERS_WITH_MORE_BITS and name in ("attn_v", "attn_qkv", "ffn_down")
            assert types.by_name[f"blk.{i}.{name}.weight"] == (many if is_rich else few)
    ends = {name: types.by_name[f"{name}.weight"] for name in ("token_embd", "output", "output_norm")}
    assert ends == {"token_embd": few, "output": Type.Q6_K, "output_norm": Type.F32}
    del shapes["output.weight"]  # tied: the embeddings are the output layer
    assert gguf_types.choose(shapes, export_type, 10).by_name["token_embd.weight"] == Type.Q6_K


@pytest.mark.parametrize(
    ("row_length", "expected"),
    [
        (256, {"few": Type.Q4_K, "many": Type.Q6_K, "output": Type.Q6_K}),
        (576, {"few": Type.Q5_0, "many": Type.Q8_0, "output": Type.Q8_0}),  # SmolLM2 135M
        (40, {"few": Type.F16, "many": Type.F16, "output": Type.F16}),
    ],
)
def test_a_row_that_fills_no_block_gets_the_next_type(row_length: int, expected: dict[str, Type]) -> None:
    names = {"few": "blk.1.attn_q.weight", "many": "blk.0.attn_v.weight", "output": "output.weight"}
    types = gguf_types.choose(dict.fromkeys(names.values(), (64, row_length)), "gguf-q4_k_m", 10)
    assert {key: types.by_name[name] for key, name in names.items()} == expected
    # The output layer is asked for in q8_0 at once, as llama.cpp does.
    assert len(types.fallbacks) == {256: 0, 576: 2, 40: 3}[row_length]


def test_of_smollm2_135m_as_many_tensors_fall_back_as_in_llama_cpp() -> None:
    rows = {"attn_q": 576, "attn_k": 576, "attn_v": 576, "attn_output": 576, "ffn_gate": 576, "ffn_up": 576}
    rows |= {"ffn_down": 1536}
    shapes: dict[str, tuple[int, ...]] = {f"blk.{i}.{n}.weight": (64, r) for i in range(30) for n, r in rows.items()}
    shapes["token_embd.weight"] = (49_152, 576)
    assert len(gguf_types.choose(shapes, "gguf-q4_k_m", 30).fallbacks) == 180


@pytest.mark.parametrize(
    ("tensor_type", "digest"),
    # The first 16 digits of the sha256 of what llama_model_quantize wrote for these values.
    [
        (Type.Q4_K, "3d7c19e9177a9a32"),
        (Type.Q5_K, "72bc298303b5628e"),
        (Type.Q6_K, "bde15c53c88a28fd"),
        (Type.Q5_0, "068f1835de44dd1e"),
    ],
)
def test_the_bytes_are_those_of_llama_cpps_quantizer(tensor_type: Type, digest: str) -> None:
    llama_cpp.require()
    values = torch.from_numpy(example_matrix())
    stored = gguf_blocks.quantize_by_llama_cpp(values, tensor_type)
    assert hashlib.sha256(stored.tobytes()).hexdigest()[:16] == digest
    read_back = gguf.quants.dequantize(stored, tensor_type)
    assert np.linalg.norm(read_back - values.numpy()) < 0.1 * np.linalg.norm(values.numpy())
    assert gguf_blocks.is_finite(stored, tensor_type)
    values[1, 3] = 1e30
    assert not gguf_blocks.is_finite(gguf_blocks.quantize_by_llama_cpp(values, tensor_type), tensor_type)


def example_matrix() -> np.ndarray:
    """Return numbers that bf16 and f16 hold exactly, and that need no random generator."""
    steps = (np.arange(8 * 512) ** 2 * 7919) % 251 - 125
    matrix: np.ndarray = (steps.astype(np.float32) / 128).reshape(8, 512)
    return matrix


@pytest.mark.parametrize("export_type", gguf_mixtures.EXPORTS)
def test_llama_cpp_computes_what_the_certificate_scores(tiny_model: Path, tmp_path: Path, export_type: str) -> None:
    llama_cpp.require()
    folder, path = tmp_path / "model", tmp_path / "model.gguf"
    shutil.copytree(tiny_model, folder)
    write_random_model("llama", WIDE, folder)
    notes = gguf_file.write_gguf(folder, path, export_type)
    assert "in q6_k" in notes[0]
    assert "fell back" not in notes[0]

    ids = random_ids(20)
    exact = loading.load_base(folder, dtype="float32")(ids).logits[0].detach().log_softmax(-1)
    scored = gguf_file.load_gguf(folder, path, dtype="float32")(ids).logits[0].detach().log_softmax(-1)
    lengths = range(1, 21)
    theirs = llama_cpp.log_probabilities(llama_cpp.start_server(path), ids[0].tolist(), lengths, exact.shape[-1])
    # llama.cpp also rounds the activations to 8 bits, which costs less than the rounding of the weights.
    assert float((theirs - scored).norm()) < 0.5 * float((theirs - exact).norm())


def test_tensors_that_fell_back_are_told(tiny_model: Path, tmp_path: Path) -> None:
    llama_cpp.require()
    (note,) = gguf_file.write_gguf(tiny_model, tmp_path / "model.gguf", "gguf-q4_k_m")
    assert note.startswith("12 in q5_0, 5 in f32, 3 in q8_0; 14 of 20 tensors fell back to q5_0, q8_0")


def test_without_llama_cpp_a_mixture_is_refused_by_name_before_anything_is_built(
    inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(UsageError, match=r"gguf-q4_k_m is written by llama\.cpp's own quantizer, and xllamacpp is not"):
        run(MergeConfig(device="cpu", exports=["bf16", "gguf-q4_k_m"]), **inputs)
    assert list(inputs["model"].iterdir()) == []
