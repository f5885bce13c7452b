"""The forms beside bf16: what they hold, what they lose, and that llama.cpp computes what transformers computes."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from components.merge_adapter import gguf_file, gguf_types
from components.merge_adapter.merge import merge
from components.merge_adapter.step import run
from qlora_retrain.config.sections import MergeConfig
from qlora_retrain.core.errors import Exit, IntegrityError, UsageError
from qlora_retrain.evaluation import scoring
from qlora_retrain.lm import chat, loading
from qlora_retrain.pipeline import make_plan
from tests.components.merge_adapter import llama_cpp

ALL = ["bf16", "nf4", "gguf-f16", "gguf-q8_0", "gguf-q5_k_m", "gguf-q4_k_m", "gguf-q4_1", "gguf-q4_0", "gguf-lora"]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path) -> Path:
    """Merge the tiny model."""
    merged = tmp_path / "merged"
    merged.mkdir()
    merge(tiny_model, tiny_nf4, tiny_adapter, merged, dequantized=True, max_shard_gib=5.0)
    return merged


@pytest.mark.slow
def test_every_export_ships_with_a_loss_of_its_own(inputs: dict[str, Path]) -> None:
    config = MergeConfig(device="cpu", base="dequantized", exports=ALL, max_export_loss_increase_nats=None)  # type: ignore[arg-type]
    report = run(config, **inputs)
    assert report.refused is None
    model = inputs["model"]
    exports = json.loads((model / "certificate.json").read_text())["exports"]
    assert list(exports) == ALL
    assert exports["gguf-f16"]["loss"] == pytest.approx(exports["bf16"]["loss"], abs=1e-4)  # bf16 fits into f16 here
    assert exports["gguf-q8_0"]["loss"] != exports["bf16"]["loss"]

    # Each is a file or a folder that other users can read, of the size and the loss that the documents say.
    for name in ALL[1:]:
        path = model / exports[name]["path"]
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        assert sum(file.stat().st_size for file in files) == exports[name]["size_bytes"]
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in files)
        assert report.numbers[f"loss_{name}"] == exports[name]["loss"]
        assert name in (model / "report.html").read_text()
    assert str(model) not in (model / "exports/nf4/config.json").read_text()

    # The 4-bit form is loaded once more, as a consumer would, and its loss computed in another way.
    quantized = loading.load_nf4(model / "exports/nf4", dtype="float32")
    rows = scoring.read_rows(inputs["dataset"] / "eval.jsonl", "eval")
    tokenizer, loss, tokens = chat.load_tokenizer(model), 0.0, 0
    for row in rows:
        (encoded,) = tokenizer.encode(row.messages)
        ids, is_target = torch.tensor(encoded.input_ids), torch.tensor(encoded.supervised)[1:]
        with torch.no_grad():
            logits = quantized(ids[None]).logits[0, :-1]
        loss += float(torch.nn.functional.cross_entropy(logits[is_target], ids[1:][is_target], reduction="sum"))
        tokens += int(is_target.sum())
    assert exports["nf4"]["loss"] == pytest.approx(loss / tokens, rel=1e-4)


def test_an_export_that_costs_too_much_refuses_the_version(inputs: dict[str, Path]) -> None:
    config = MergeConfig(
        device="cpu", base="dequantized", exports=["bf16", "gguf-q4_0"], max_export_loss_increase_nats=1e-9
    )  # fmt: skip
    report = run(config, **inputs)
    assert report.refused is not None
    assert report.refused.exit_code == Exit.QUALITY_REFUSED
    assert "lost by gguf-q4_0 against the unmerged model" in str(report.refused)


@pytest.mark.parametrize("kind", sorted(gguf_types.MATRIX_TYPES))
def test_a_gguf_file_holds_the_weights_of_the_merged_model(folder: Path, tmp_path: Path, kind: str) -> None:
    gguf_file.write_gguf(folder, tmp_path / "model.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    merged = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    assert len(stored) == len(merged)

    # A step of each type: f16 has 11 significant bits, q8_0 127 levels a block, q4_0 only 7, and q4_1 15.
    # Rows of 64 numbers do not fill a block of 256, so the mixtures fall back to q5_0 and q5_1.
    tolerances = {"gguf-f16": 1e-3, "gguf-q8_0": 1e-2, "gguf-q4_0": 0.15, "gguf-q4_1": 0.1}
    tolerance = tolerances.get(kind, 0.08)
    for layer in range(2):
        for name, gguf_name in (
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("mlp.down_proj", "ffn_down"),
        ):
            expected = merged[f"model.layers.{layer}.{name}.weight"]
            actual = stored[f"blk.{layer}.{gguf_name}.weight"].reshape(expected.shape)
            if name != "mlp.down_proj":
                # By hand: row 2i of a head is its row i, row 2i + 1 is its row i + 8 (16 rows a head).
                order = [h * 16 + i + half * 8 for h in range(len(expected) // 16) for i in range(8) for half in (0, 1)]
                expected = expected[order]
            assert np.linalg.norm(actual - expected) < tolerance * np.linalg.norm(expected), (name, kind)

    # Vectors are stored in fp32, so they are equal bit by bit.
    norm = stored["output_norm.weight"]
    assert np.array_equal(norm.reshape(-1), merged["model.norm.weight"])


@pytest.mark.parametrize("kind", sorted(gguf_types.MATRIX_TYPES))
def test_numbers_that_a_block_cannot_hold_are_refused_by_name(folder: Path, tmp_path: Path, kind: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = -1e30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        IntegrityError, match=rf"{kind}: model\.layers\.1\.mlp\.up_proj\.weight holds numbers too large"
    ):
        gguf_file.write_gguf(folder, tmp_path / "model.gguf", kind)


def test_writing_a_gguf_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    # Without a date or a version in the header, as the artifact's hash needs it.
    for name in ("one", "two"):
        gguf_file.write_gguf(folder, tmp_path / name, "gguf-q8_0")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("config.json", {"architectures": ["GPTNeoXForCausalLM"]}, "the base is GPTNeoXForCausalLM"),
        (
            "config.json",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10_000.0}},
            "the base has yarn",
        ),
        ("config.json", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "has dynamic"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizers gpt-2, smollm"),
        ("config.json", {"vocab_size": 500}, "the base has 500 embeddings"),
    ],
)
def test_what_gguf_has_no_name_for_is_refused_by_the_plan_and_by_the_step_in_the_same_words(
    inputs: dict[str, Path], tmp_path: Path, tickets: Path, file: str, edit: dict[str, Any], message: str
) -> None:
    # The words are equal because both come from `gguf_names`.
    base = tmp_path / "base"
    shutil.copytree(inputs["base_model"], base)
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | edit))
    config = MergeConfig(device="cpu", exports=["bf16", "gguf-f16"])
    with pytest.raises(UsageError, match=message) as by_step:
        run(config, **{**inputs, "base_model": base})
    assert list(inputs["model"].iterdir()) == []

    # The plan reads the same files, hours before the step would.
    line = tmp_path / "line.yaml"
    line.write_text(f"line: tickets\nsources: {{raw_data: {tickets}, base_model: {base}}}\n")
    root = (tmp_path / "store").as_uri()
    with pytest.raises(UsageError) as by_plan:
        make_plan.make_plan(line, root, overrides=["merge.exports=[bf16, nf4, gguf-q8_0]"])
    assert str(by_plan.value) == str(by_step.value)
    # Tokens without an embedding are a fault of the base, whatever it is exported to.
    if "embeddings" not in message:
        make_plan.make_plan(line, root, overrides=["merge.exports=[bf16, nf4]"])


def test_a_tensor_that_gguf_has_no_name_for_is_refused_before_anything_is_built(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    # transformers would ignore such a tensor, so only the names in the file show it.
    base = tmp_path / "base"
    shutil.copytree(inputs["base_model"], base)
    save_file(
        {**load_file(base / "model.safetensors"), "model.extra.weight": torch.zeros(2)}, base / "model.safetensors"
    )
    with pytest.raises(UsageError, match=r"no name for the tensor model\.extra\.weight"):
        run(MergeConfig(device="cpu", exports=["bf16", "gguf-f16"]), **{**inputs, "base_model": base})
    assert list(inputs["model"].iterdir()) == []


def test_llama_cpp_answers_a_question(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for kind in ("gguf-f16", "gguf-q8_0"):
        gguf_file.write_gguf(folder, tmp_path / "model.gguf", kind)
        llama = llama_cpp.start_server(tmp_path / "model.gguf")
        messages = [{"role": "user", "content": "my money back of order number 1003"}]
        assert llama.answer(messages, max_tokens=8).strip() == "refund"
