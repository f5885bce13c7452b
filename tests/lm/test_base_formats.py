"""Every base format: what it stores has the bits that its arithmetic says, and each reader unpacks the same values."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.quantize_model.step import run as quantize
from qlora_retrain.config.sections import QuantizeConfig
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import base_formats, four_bit, loading
from qlora_retrain.lm.base_formats import FORMATS, FourBits, MixedBits, SixteenBits
from qlora_retrain.lm.weight_files import SafetensorsFolder

SETTINGS: list[dict[str, Any]] = [
    {"format": "none"},
    {"format": "nf4"},
    {"format": "nf4", "double_quant": False},
    {"format": "fp4"},
    {"format": "fp4", "double_quant": False},
    {"format": "int4"},
    {"format": "nf4-shifted"},
    {"format": "mixed", "bits_per_weight": 6.0},
]
IDS = torch.tensor([[1, 5, 9, 200, 2]])


def write(base: Path, folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    quantize(QuantizeConfig(**settings), base, folder)
    return folder


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def stored(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The settings, and the tiny model in this form."""
    folder = tmp_path_factory.mktemp("base") / "base_nf4"
    return request.param, write(tiny_model, folder, **request.param)


def test_a_folder_says_its_format(stored: Any) -> None:
    settings, folder = stored
    expected = base_formats.from_settings(QuantizeConfig(**settings).model_dump())
    base_format = base_formats.from_folder(folder)
    if isinstance(expected, MixedBits):  # the folder also has the choice, which leaves some of the budget
        assert base_format.bits_per_weight <= expected.bits_per_weight == 6
        expected = replace(expected, bits=base_format.bits_per_weight, layers_in_8_bits=base_format.layers_in_8_bits)
    assert base_format == expected
    assert json.loads((folder / "quantization.json").read_text())["settings"]["format"] == settings["format"]


def test_the_stored_bytes_have_the_bits_of_the_arithmetic(stored: Any) -> None:
    settings, folder = stored
    bits = {"none": 16, "nf4": 4.126953125, "fp4": 4.126953125, "int4": 5, "nf4-shifted": 4.25390625}.get(
        settings["format"]
    )
    bits = bits or _bits_of_layers(folder)
    bits = bits if settings.get("double_quant", True) else 4.5
    assert base_formats.from_folder(folder).bits_per_weight == bits
    document = json.loads((folder / "quantization.json").read_text())
    assert document["bits_per_weight_promised"] == pytest.approx(bits, abs=1e-5)

    # Counted a second way: the bytes of all that belongs to a layer, without tables; a tiny tensor fills no group.
    tensors = load_file(folder / "model.safetensors")
    parts = [t for n, t in tensors.items() if "_proj." in n and not n.endswith(("quant_map", "4"))]
    num_weights = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert 8 * sum(t.nbytes for t in parts) / num_weights == pytest.approx(document["bits_per_weight"], abs=1e-4)
    assert document["bits_per_weight"] == pytest.approx(bits, rel=0.01)


def _bits_of_layers(folder: Path) -> float:
    """Return the mean of the bits of each layer by whether the report names it."""
    names = json.loads((folder / "quantization.json").read_text())["layers_in_8_bits"]
    assert 0 < len(names) < 14
    sizes = {n: t.numel() for n, t in load_file(folder / "model.safetensors").items() if n.endswith("_proj.weight")}
    in_8_bits = sum(sizes[f"{name}.weight"] for name in names)
    in_4_bits = 2 * (sum(sizes.values()) - in_8_bits)
    return (8.126953125 * in_8_bits + 4.126953125 * in_4_bits) / (in_8_bits + in_4_bits)


def test_the_files_the_loaded_layers_and_fp32_have_the_same_values(stored: Any) -> None:
    _, folder = stored
    base_format = base_formats.from_folder(folder)
    packed, plain = (loading.load_nf4(folder, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert packed.dtype == torch.bfloat16
    assert plain.dtype == torch.float32
    with SafetensorsFolder(folder) as tensors:
        names = [name for name in tensors.names if name.endswith("_proj.weight")]
        assert len(names) == 14
        assert base_format.packed_names(tensors.names) == (set(names) if base_format.is_packed else set())
        for name in names:
            values = base_format.unpack(name, tensors)
            layer = packed.get_submodule(name.removesuffix(".weight"))
            assert base_format.is_packed_layer(layer) == base_format.is_packed
            assert torch.equal(base_formats.layer_weight(layer), values)
            assert torch.equal(plain.get_parameter(name), values.float())


@pytest.mark.parametrize("settings", SETTINGS[1:5], ids=str)
def test_what_was_unpacked_is_packed_to_the_same_codes(settings: dict[str, Any]) -> None:
    weights = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    quant_type, double_quant = settings["format"], settings.get("double_quant", True)
    layer = torch.nn.Module()
    layer.weight, layer.quant_state = four_bit.quantize(weights, quant_type, double_quant, "cpu")
    unpacked = base_formats.layer_weight(layer)
    assert float((unpacked - weights).norm() / weights.norm()) < 0.15
    # The scales move by their own rounding alone, and no code with them.
    codes, _ = four_bit.quantize(unpacked, quant_type, double_quant, "cpu")
    assert float((codes == layer.weight).float().mean()) > 0.98


def test_16_bits_are_the_base_itself(tiny_model: Path, tmp_path: Path) -> None:
    folder = write(tiny_model, tmp_path / "base_nf4", format="none")
    base, copied = load_file(tiny_model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert base.keys() == copied.keys()
    assert all(torch.equal(copied[name], base[name]) for name in base)
    logits = [model(IDS).logits for model in (loading.load_nf4(folder), loading.load_base(tiny_model, dtype="float32"))]
    assert torch.equal(*logits)
    document = json.loads((folder / "quantization.json").read_text())
    assert (document["relative_error"], document["quantized_weights"], document["quantized_fraction"]) == (0, 0, 0)
    assert (folder / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()


def test_a_wider_base_is_rounded_and_the_error_is_measured(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    torch.manual_seed(0)
    wide = {n: t.float() * (1 + torch.rand(t.shape) / 300) for n, t in load_file(base / "model.safetensors").items()}
    save_file(wide, base / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(document | {"dtype": "float32"}))
    folder = write(base, tmp_path / "base_nf4", format="none")
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in wide.items())
    numbers = json.loads((folder / "quantization.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    squares = [
        (stored[n].double() - w.double()).square().sum() for n, w in wide.items() if n.endswith("up_proj.weight")
    ]
    norms = [w.double().square().sum() for n, w in wide.items() if n.endswith("up_proj.weight")]
    assert numbers["relative_error_by_layer"]["up_proj"] == pytest.approx(
        float(sum(squares) / sum(norms)) ** 0.5, abs=1e-5
    )
    assert 1e-4 < numbers["relative_error"] < 4e-3
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert stored[name].dtype == torch.bfloat16


def test_numbers_that_16_bits_cannot_hold_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e30
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fp16").mkdir()
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight holds numbers .* too large for float16"):
        quantize(QuantizeConfig(format="none", compute_dtype="float16"), base, tmp_path / "fp16")


def test_a_quantized_base_is_no_base_in_16_bits(tiny_model: Path, tmp_path: Path) -> None:
    nf4 = write(tiny_model, tmp_path / "nf4", format="nf4")
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="is already quantized"):
        quantize(QuantizeConfig(format="none"), nf4, tmp_path / "none")


@pytest.mark.parametrize("base_format", ["none", "int4", "nf4-shifted", "mixed"])
def test_double_quant_without_scales_is_refused(base_format: str) -> None:
    with pytest.raises(ValueError, match=rf"double_quant: false is for format: nf4 and fp4.*format is {base_format}"):
        QuantizeConfig(format=base_format, double_quant=False)


def test_the_table_has_every_value_of_the_setting() -> None:
    values = QuantizeConfig.model_json_schema()["properties"]["format"]["enum"]
    assert set(FORMATS) == set(values)
    formats = {name: base_formats.from_settings(QuantizeConfig(format=name).model_dump()) for name in values}
    assert formats["none"] == SixteenBits()
    assert formats["fp4"] == FourBits("fp4", double_quant=True, compute_dtype="bfloat16")
