"""The `nf4` export is quantized tensor by tensor, and has the bytes that transformers writes with the whole model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from components.merge_adapter import exports
from qlora_retrain.lm import loading

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
DOUBLE = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def write_model(folder: Path, tokenizer: Path, family: str, *, max_shard_size: str = "5GB", **options: Any) -> Path:
    """Write a random model in bf16 with its tokenizer, as a merge leaves it."""
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("model*", "config.json"))
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**{**SIZES, **options}))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def write_nf4(model: Path, folder: Path, **settings: Any) -> Path:
    """Quantize a model in another tool's way: the settings of this folder are those of the export."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=quantization, dtype=torch.bfloat16)
    loaded.save_pretrained(folder)
    return folder


def export_by_transformers(model: Path, nf4: Path, folder: Path, max_shard_size: str) -> dict[str, bytes]:
    """Quantize with transformers' own quantizer, which has the whole 4-bit model in memory; return the files."""
    settings = AutoModelForCausalLM.from_pretrained(nf4).config.quantization_config.to_dict()
    loaded = loading.load_base(model, dtype="bfloat16", quantization=BitsAndBytesConfig.from_dict(settings))
    loaded.config._name_or_path = ""
    loaded.save_pretrained(folder, max_shard_size=max_shard_size)
    exports.copy_tokenizer(model, folder)
    return read_files(folder)


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("family", "options", "settings"),
    [
        ("Llama", {"tie_word_embeddings": True}, DOUBLE),
        ("Llama", {"tie_word_embeddings": False}, DOUBLE | {"bnb_4bit_use_double_quant": False}),
        ("Qwen2", {}, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
        ("Qwen3", {}, DOUBLE | {"llm_int8_skip_modules": ["lm_head", "down_proj"]}),
        ("Gemma3", {"sliding_window": 16}, DOUBLE),
        ("Phi3", {"original_max_position_embeddings": 64}, DOUBLE),
    ],
)
def test_the_files_have_the_bytes_that_transformers_writes(tmp_path, tiny_model, family, options, settings):
    model = write_model(tmp_path / "model", tiny_model, family, **options)
    nf4 = write_nf4(model, tmp_path / "nf4", **settings)
    exports._quantize(model, model, nf4, tmp_path / "export", max_shard_gib=5.0)
    files = read_files(tmp_path / "export")
    expected = export_by_transformers(model, nf4, tmp_path / "expected", "5GB")
    assert files.keys() == expected.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert [name for name in files if files[name] != expected[name]] == []
    # Layers that the base leaves out stay in 16 bits.
    stored = load_file(tmp_path / "export/model.safetensors")
    is_packed = stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.uint8
    assert is_packed == ("llm_int8_skip_modules" not in settings)


def test_a_merged_model_in_shards_becomes_shards_of_the_size_that_the_line_sets(tmp_path, tiny_model):
    model = write_model(tmp_path / "model", tiny_model, "Llama", max_shard_size="100KB")
    nf4 = write_nf4(model, tmp_path / "nf4", **DOUBLE)
    exports._quantize(model, model, nf4, tmp_path / "export", max_shard_gib=2**-14)
    files = read_files(tmp_path / "export")
    assert files == export_by_transformers(model, nf4, tmp_path / "expected", f"{2**-14 * 1024**3 / 1e6:.0f}MB")
    assert len([name for name in files if name.endswith(".safetensors")]) > 1


def test_the_packed_weights_lie_in_mapped_files_and_not_in_memory_of_the_process(tmp_path, tiny_model, monkeypatch):
    model = write_model(tmp_path / "model", tiny_model, "Llama")
    nf4 = write_nf4(model, tmp_path / "nf4", **DOUBLE)
    mapped: dict[str, int] = {}
    copy_tokenizer = exports.copy_tokenizer

    # Called while the quantized model is still alive.
    def look_and_copy(source: Path, folder: Path) -> None:
        lines = Path("/proc/self/maps").read_text().split("\n")
        ranges = [line.split()[0].split("-") for line in lines if f"{folder}/weight.tmp (deleted)" in line]
        mapped["files"], mapped["bytes"] = len(ranges), sum(int(end, 16) - int(start, 16) for start, end in ranges)
        copy_tokenizer(source, folder)

    monkeypatch.setattr(exports, "copy_tokenizer", look_and_copy)
    exports._quantize(model, model, nf4, tmp_path / "export", max_shard_gib=5.0)
    stored = load_file(tmp_path / "export/model.safetensors")
    packed = [t for name, t in stored.items() if re.search(r"\.weight(\.absmax)?$", name) and t.dtype == torch.uint8]
    assert mapped["files"] == len(packed) == 2 * 7 * SIZES["num_hidden_layers"]
    assert mapped["bytes"] >= sum(t.nbytes for t in packed)
    assert not list((tmp_path / "export").glob("*.tmp"))
