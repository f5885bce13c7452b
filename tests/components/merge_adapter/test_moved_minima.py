"""An adapter of QA-LoRA over `int4` ships in 4 bits without another quantization: only the minima move."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from components.evaluate.step import run as evaluate
from components.merge_adapter import adapter_forms, gguf_file, moved_minima
from components.merge_adapter.merge import merge
from components.merge_adapter.step import run
from components.quantize_model.step import run as quantize
from components.train_qlora import adapter as training
from qlora_retrain.config.sections import MergeConfig, QuantizeConfig, TrainConfig
from qlora_retrain.core.errors import Diverged
from qlora_retrain.lm import chat, loading
from tests.components.merge_adapter import llama_cpp
from tests.components.merge_adapter.conftest import RULES

IDS = torch.tensor([[1, 5, 9, 200, 2, 31, 7]])
NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def int4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in `int4`."""
    folder = tmp_path_factory.mktemp("int4")
    quantize(QuantizeConfig(format="int4"), tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def write_adapter(int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write an adapter with random numbers, as training ships it."""

    def write(method: str = "qa-lora", size: float = 0.02) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        config = TrainConfig(method=method, rank=4, device="cpu", attention="eager", precision="float32")
        torch.manual_seed(1)
        model = training.attach_new(loading.load_nf4(int4), config)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=size)
        training.export(model, folder, config)
        return folder

    return write


def write_gguf(tiny_model: Path, int4: Path, adapter: Path, folder: Path) -> dict[str, NDArray[np.float32]]:
    """Write the file, and return its tensors as the gguf package reads them."""
    merged = folder / "merged"
    merged.mkdir()
    merge(tiny_model, int4, adapter, merged, dequantized=True, max_shard_gib=5.0)
    with moved_minima.open_blocks(tiny_model, int4, adapter) as blocks:
        gguf_file.write_gguf(merged, folder / "model.gguf", "gguf-q4_1", blocks)
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def test_the_file_holds_the_trained_model_within_the_rounding_of_its_minima(
    tiny_model: Path, int4: Path, write_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = write_adapter()
    stored = write_gguf(tiny_model, int4, adapter, tmp_path)
    live = loading.attach_adapter(loading.load_nf4(int4), adapter)
    layer = live.get_submodule(f"base_model.model.{NAME}")
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    expected = (layer.base_layer.weight + b @ a).numpy()
    actual = stored["blk.0.ffn_down.weight"].reshape(expected.shape)
    minima = load_file(int4 / "model.safetensors")[f"{NAME}.minima"].float() + (b @ a)[:, ::32]
    # Half a unit of the last digit of m' in fp16, and what fp32 rounds.
    unit = np.spacing(np.abs(minima.numpy()).astype(np.float16)).astype(np.float32)
    assert (np.abs(actual - expected) <= unit.repeat(32, axis=1) * 0.501 + 1e-7).all()

    # Of the update itself, more is lost: it is a small number that is added to a larger one.
    base = gguf.quants.dequantize(gguf.quants.quantize(_original(tiny_model), Q4_1), Q4_1)
    update = (b @ a).numpy()
    assert np.linalg.norm(actual - base - update) < 0.02 * np.linalg.norm(update)

    # The whole file, embeddings in 8 bits too, answers as the live model does.
    logits = [m(IDS).logits.detach() for m in (live, gguf_file.load_gguf(tmp_path / "merged", tmp_path / "model.gguf"))]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.05


Q4_1 = gguf.GGMLQuantizationType.Q4_1


def _original(tiny_model: Path) -> NDArray[np.float32]:
    weights: NDArray[np.float32] = load_file(tiny_model / "model.safetensors")[f"{NAME}.weight"].float().numpy()
    return weights


def test_codes_and_steps_are_those_of_the_base(
    tiny_model: Path, int4: Path, write_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = write_adapter()
    expected = gguf.quants.quantize(_original(tiny_model), Q4_1).reshape(-1, 20)
    with moved_minima.open_blocks(tiny_model, int4, adapter) as blocks:
        packed = blocks(f"{NAME}.weight")
        assert blocks("model.embed_tokens.weight") is None
    assert packed is not None
    actual = packed.numpy().reshape(-1, 20)
    assert np.array_equal(actual[:, :2], expected[:, :2])
    assert np.array_equal(actual[:, 4:], expected[:, 4:])
    assert not np.array_equal(actual[:, 2:4], expected[:, 2:4])


def test_cut_and_weakened_adapters_move_minima_too_and_no_others_do(
    int4: Path, tiny_nf4: Path, write_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = write_adapter()
    assert moved_minima.applies(int4, adapter)
    assert not moved_minima.applies(tiny_nf4, adapter)
    adapter_forms.cut(adapter, tmp_path / "cut", 2)
    adapter_forms.weaken(adapter, tmp_path / "weak", 0.7)
    assert moved_minima.applies(int4, tmp_path / "cut")
    assert moved_minima.applies(int4, tmp_path / "weak")
    for method in ("lora", "dora"):
        assert not moved_minima.applies(int4, write_adapter(method))


def test_minima_beyond_fp16_are_refused(tiny_model: Path, int4: Path, write_adapter: Callable[..., Path]) -> None:
    with (
        moved_minima.open_blocks(tiny_model, int4, write_adapter(size=1e5)) as blocks,
        pytest.raises(Diverged, match=r"down_proj\.weight gives numbers that are too large for fp16"),
    ):
        blocks(f"{NAME}.weight")


@pytest.fixture
def inputs(
    tiny_model: Path, int4: Path, write_dataset: Callable[..., Path], tmp_path: Path
) -> Callable[[Path], dict[str, Any]]:
    """Evaluate an adapter over `int4`, and return what the merge reads."""

    def evaluated(adapter: Path) -> dict[str, Any]:
        folders = {"base_model": tiny_model, "base_nf4": int4, "adapter": adapter}
        dataset, evaluation, model = write_dataset(tmp_path / "dataset"), tmp_path / "evaluation", tmp_path / "model"
        evaluation.mkdir()
        model.mkdir()
        nothing = {"champion": None, "anchor": None, "golden_data": None, "reference_data": None}
        evaluate(RULES, dataset, **folders, **nothing, evaluation=evaluation)
        return {"dataset": dataset, **folders, "evaluation": evaluation, "reference_data": None, "model": model}

    return evaluated


def test_the_step_ships_both_forms_and_the_one_in_4_bits_costs_next_to_nothing(
    inputs: Callable[[Path], dict[str, Any]], write_adapter: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folders = inputs(write_adapter())
    exports = ["bf16", "nf4", "gguf-q4_1"]
    config = MergeConfig(device="cpu", base="dequantized", exports=exports, max_export_loss_increase_nats=None)
    run(config, **folders)
    certificate = json.loads((folders["model"] / "certificate.json").read_text())
    live = certificate["forms"]["certification"]["live"]["loss"]
    losses = {name: export["loss"] for name, export in certificate["exports"].items()}
    assert losses["bf16"] == pytest.approx(live, abs=0.01)
    assert losses["gguf-q4_1"] == pytest.approx(live, abs=0.02)
    assert abs(losses["gguf-q4_1"] - live) < abs(losses["nf4"] - live)
    assert "gguf-q4_1: the codes of base_nf4 with the adapter in their minima" in capsys.readouterr().out


def test_another_adapter_over_int4_is_quantized_again(
    tiny_model: Path, int4: Path, write_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    # An adapter of PEFT, over packed layers.
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(loading.load_nf4(int4, dtype="bfloat16"), settings).save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    merged.mkdir()
    merge(tiny_model, int4, tmp_path / "adapter", merged, dequantized=True, max_shard_gib=5.0)
    gguf_file.write_gguf(merged, tmp_path / "model.gguf", "gguf-q4_1")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_down.weight")
    weights = load_file(merged / "model.safetensors")[f"{NAME}.weight"].float().numpy()
    assert np.array_equal(tensor.data.reshape(len(weights), -1), gguf.quants.quantize(weights, Q4_1))


def test_llama_cpp_computes_what_the_live_model_computes(
    tiny_model: Path, int4: Path, write_adapter: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter()
    write_gguf(tiny_model, int4, adapter, tmp_path)
    live = loading.attach_adapter(loading.load_nf4(int4), adapter)
    llama = llama_cpp.start_server(tmp_path / "model.gguf")
    tokenizer = chat.load_tokenizer(tiny_model).tokenizer
    ids = tokenizer("where is the parcel of order number 1003?", add_special_tokens=False)["input_ids"]
    logits = live(torch.tensor([ids])).logits[0].detach()
    any_token = tokenizer.convert_tokens_to_ids("a")
    theirs = torch.tensor(
        [
            llama.log_probabilities(ids[:length], vocabulary=logits.shape[-1], any_token=any_token)
            for length in range(1, len(ids) + 1)
        ]
    )
    # llama.cpp rounds the inputs of such a layer to 8 bits.
    difference = (logits.log_softmax(-1) - theirs).abs().mean()
    assert difference < 0.05 * logits.std()
