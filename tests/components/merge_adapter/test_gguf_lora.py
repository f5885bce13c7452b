"""The adapter as a GGUF LoRA: it is read back as it was, and llama.cpp computes with it what PEFT computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch

from benchmarks.llama_server import LlamaServer
from components.merge_adapter import gguf_file, gguf_lora
from qlora_retrain.config.line import LineConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import loading
from tests.components.merge_adapter import llama_cpp
from tests.components.merge_adapter.test_gguf_families import random_ids


def test_the_base_with_the_file_is_the_base_with_the_adapter(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    path, base_path, ids = tmp_path / "adapter.gguf", tmp_path / "base.gguf", random_ids(16)
    gguf_lora.write_gguf_lora(tiny_model, tiny_adapter, path)
    base = loading.load_base(tiny_model, dtype="float32")
    plain = base(ids).logits[0].detach()
    expected = loading.attach_adapter(base, tiny_adapter)(ids).logits[0].detach()
    read_back = gguf_lora.load_over_base(tiny_model, path, dtype="float32")(ids).logits[0].detach()
    assert float((plain - expected).norm() / expected.norm()) > 0.01
    assert float((read_back - expected).norm() / expected.norm()) < 1e-5

    llama_cpp.require()
    gguf_file.write_gguf(tiny_model, base_path, "gguf-f16")
    llama = LlamaServer(base_path, context_tokens=128, adapter=path)
    assert llama_cpp.compare(llama, expected, ids[0].tolist(), (1, 8, 16)) < 0.005


def test_the_scale_of_llama_cpp_is_one(tiny_model: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    gguf_lora.write_gguf_lora(tiny_model, tiny_adapter, tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    alpha = reader.get_field("adapter.lora.alpha")
    ranks = {int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name.endswith("lora_a")}
    assert alpha is not None
    assert ranks == {alpha.contents()}
    kind = reader.get_field("general.type")
    assert kind is not None
    assert kind.contents() == "adapter"


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"use_dora": True}, "the magnitudes of DoRA"), ({"peft_type": "IA3"}, "this one is no LoRA")],
)
def test_an_adapter_that_is_more_than_two_matrices_is_refused(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | fields))
    if "use_dora" in fields:
        _add_magnitudes(adapter)
    with pytest.raises(UsageError, match=message):
        gguf_lora.write_gguf_lora(tiny_model, adapter, tmp_path / "adapter.gguf")


def _add_magnitudes(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= {
        name.replace("lora_B.weight", "lora_magnitude_vector.weight"): torch.ones(tensor.shape[0])
        for name, tensor in tensors.items()
        if name.endswith("lora_B.weight")
    }
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("train", "reason"),
    [({"method": "dora"}, "train.method: dora"), ({"modules_to_save": ["lm_head"]}, "train.modules_to_save")],
)
def test_check_refuses_the_export_for_methods_that_have_none(train: dict[str, object], reason: str) -> None:
    sources = {"raw_data": {"uri": "a"}, "base_model": {"uri": "b"}}
    merge = {"exports": ["bf16", "gguf-lora"]}
    with pytest.raises(ValueError, match=f"gguf-lora holds two matrices for a layer, and with {reason}"):
        LineConfig.model_validate({"line": "tickets", "sources": sources, "train": train, "merge": merge})
