"""A config.json that declares another model than the weights are ends within seconds, before memory is taken for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_retrain.core.errors import IntegrityError, Problem, UsageError
from qlora_retrain.lm import declared_size, loading
from qlora_retrain.lm.chat import load_tokenizer
from qlora_retrain.lm.chat_format import ChatFormat


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base_model"))


def declare(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("num_hidden_layers", 10**9, IntegrityError, "it declares 1,000,000,000 layers, and the files hold 20 tensors"),
        ("vocab_size", 10**9, IntegrityError, r"it declares 64,000,\d+,\d+ numbers, and the files hold 106,816"),
        ("intermediate_size", 10**8, IntegrityError, "its weights do not fit its config.json"),
        ("head_dim", 10**6, IntegrityError, "its weights do not fit its config.json"),
        ("pad_token_id", 10**9, UsageError, "cannot be loaded as a causal language model: AssertionError"),
        ("num_key_value_heads", 0, UsageError, "cannot be loaded as a causal language model: ZeroDivisionError"),
        ("text_config", {"model_type": "llama"}, UsageError, "cannot be loaded as a causal language model"),
    ],
)
def test_a_config_that_declares_another_model_is_refused_before_it_is_built(
    base: Path, field: str, value: Any, error: type[Problem], message: str
) -> None:
    declare(base, **{field: value})
    with pytest.raises(error, match=message):
        loading.load_base(base)


def test_a_quantized_weight_of_another_shape_than_its_layer_is_refused(base: Path) -> None:
    from transformers import BitsAndBytesConfig

    declare(base, num_key_value_heads=3)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    message = r"k_proj is \(32, 64\) in the files, and config.json declares \(48, 64\)"
    with pytest.raises(IntegrityError, match=message):
        loading.load_base(base, quantization=quantization)


def test_a_config_that_takes_the_memory_is_refused_by_the_model_and_by_the_tokenizer(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name for each of the labels.
    declare(base, num_labels=10**9)
    monkeypatch.setattr(declared_size, "_MAX_BYTES", 64 << 20)
    for load in (loading.load_base, lambda folder: load_tokenizer(folder, ChatFormat())):
        with pytest.raises(UsageError, match=r"takes more than 20 s or 64 MiB to build"):
            load(base)


def test_two_files_with_one_tensor_and_a_header_that_is_far_too_large_are_refused(base: Path) -> None:
    path = base / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, base / "a.safetensors")
    save_file({"lm_head.weight": torch.zeros(1), "model.norm.weight": torch.ones(64)}, base / "b.safetensors")
    index = dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with pytest.raises(IntegrityError, match=r"two files hold the tensor model\.norm\.weight, e\.g\. b\.safetensors"):
        loading.load_base(base)

    data = (base / "a.safetensors").read_bytes()
    num_bytes, num_spaces = int.from_bytes(data[:8], "little"), 17 << 20
    header = data[8 : 8 + num_bytes] + b" " * num_spaces
    (base / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + num_bytes :])
    with pytest.raises(IntegrityError, match=r"a safetensors header of at most 16 MiB, found 17,"):
        loading.load_base(base)


def test_outputs_have_names_whatever_the_config_says(base: Path) -> None:
    declare(base, return_dict=False)
    assert loading.load_base(base)(torch.tensor([[1, 2]])).logits.shape == (1, 2, 512)
