"""Quantizing the tiny model: what is stored, how far it is from the original, and what is refused."""

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file

from components.quantize_model import quantization_stats
from components.quantize_model.step import run
from qlora_retrain.config.sections import QuantizeConfig
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import loading
from qlora_retrain.lm.chat import load_tokenizer
from qlora_retrain.lm.chat_format import ChatFormat

# The levels as the paper prints them (arXiv 2305.14314, appendix E), to four digits.
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]


def quantize(base: Path, folder: Path, **settings) -> Path:
    folder.mkdir()
    run(QuantizeConfig(**settings), base, folder)
    return folder


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4.5)])
def test_the_bits_per_weight_are_those_of_the_methods_arithmetic(tiny_model, tmp_path, double_quant, bits):
    folder = quantize(tiny_model, tmp_path / "nf4", double_quant=double_quant)
    document = json.loads((folder / "quantization.json").read_text())
    assert document["bits_per_weight"] == pytest.approx(bits, rel=0.01)

    # Counted a second way: every stored byte whose name begins with a quantized layer's.
    tensors = load_file(folder / "model.safetensors")
    layers = {name.removesuffix(".absmax") for name in tensors if name.endswith(".weight.absmax")}
    weights = sum(2 * tensors[name].numel() for name in layers)
    stored_bytes = sum(t.numel() * t.element_size() for n, t in tensors.items() if any(n.startswith(x) for x in layers))
    assert document["quantized_weights"] == weights == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert document["bits_per_weight_with_tables"] == pytest.approx(8 * stored_bytes / weights, abs=1e-4)


def test_every_weight_becomes_the_nearest_level_of_its_block(tiny_model, tmp_path):
    folder = quantize(tiny_model, tmp_path / "nf4", double_quant=False)
    name = "model.layers.0.mlp.up_proj"
    original = load_file(tiny_model / "model.safetensors")[f"{name}.weight"].float().reshape(-1, 64)
    scale = original.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = levels[(original / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)] * scale

    module = loading.load_nf4(folder, dtype="bfloat16").get_submodule(name)
    stored = dequantize_4bit(module.weight.data, module.weight.quant_state).float().reshape(-1, 64)

    # A bf16 weight may lie midway between two levels: what counts is that no level is nearer than the stored one.
    assert ((original - stored).abs() <= (original - nearest).abs() + 0.005 * scale).all()

    relative_error = float((original - nearest).norm() / original.norm())
    document = json.loads((folder / "quantization.json").read_text())
    assert document["relative_error_by_layer"].keys() == {
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    }  # fmt: skip
    assert document["relative_error_by_layer"]["up_proj"] == pytest.approx(relative_error, rel=0.05)


def test_double_quantization_costs_less_than_a_hundredth_more_error(tiny_model, tmp_path):
    single, double = (quantize(tiny_model, tmp_path / str(d), double_quant=d) for d in (False, True))
    errors = [json.loads((f / "quantization.json").read_text())["relative_error"] for f in (single, double)]
    assert errors[0] <= errors[1] < errors[0] * 1.01


def test_the_same_base_gives_the_same_bytes_readable_by_everyone(tiny_model, tmp_path):
    first, second = quantize(tiny_model, tmp_path / "a"), quantize(tiny_model, tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert {"config.json", "model.safetensors", "quantization.json", "tokenizer.json"} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
        assert stat.S_IMODE((first / name).stat().st_mode) == 0o644
        assert str(tmp_path).encode() not in (first / name).read_bytes()
    assert (first / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()


def test_the_quantized_fraction_is_that_of_the_weights_outside_embeddings_and_head(tiny_model, tmp_path):
    document = json.loads((quantize(tiny_model, tmp_path / "nf4") / "quantization.json").read_text())
    # Counted in the original's file: matrices of two dimensions are Linear layers, apart from the tied embedding.
    sizes = {name: t for name, t in load_file(tiny_model / "model.safetensors").items() if "embed" not in name}
    linear = sum(t.numel() for t in sizes.values() if t.ndim == 2)
    assert document["quantized_fraction"] == pytest.approx(linear / sum(t.numel() for t in sizes.values()), abs=1e-5)
    assert document["quantized_fraction"] > 0.99


def test_a_base_whose_file_leaves_out_the_name_of_the_body_is_quantized_alike(tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    folders = [quantize(tiny_model, tmp_path / "a"), quantize(base, tmp_path / "b")]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    errors = [json.loads((f / "quantization.json").read_text())["relative_error_by_layer"] for f in folders]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 7


def test_a_base_into_whose_weights_nothing_could_be_merged_is_refused(tiny_model, tmp_path, monkeypatch):
    # As if transformers fused a weight of the file with others.
    names = quantization_stats.names_in_model
    monkeypatch.setattr(
        quantization_stats,
        "names_in_model",
        lambda *args: {f: m for f, m in names(*args).items() if "layers.1.mlp.up_proj" not in f},
    )
    with pytest.raises(UsageError, match=r"1 of 14 quantized weights of LlamaForCausalLM .*layers\.1\.mlp\.up_proj"):
        quantize(tiny_model, tmp_path / "nf4")


@pytest.fixture
def mixture(tiny_model, tmp_path):
    """A tiny mixture of experts beside the tiny model's tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = Path(shutil.copytree(tiny_model, tmp_path / "mixture"))
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_base_of_which_most_stays_in_16_bits_is_refused(mixture, tmp_path):
    with pytest.raises(UsageError, match=r"only 5\.\d% .* quantize\.min_quantized_fraction is 0\.9.*\.experts\."):
        quantize(mixture, tmp_path / "nf4")
    assert list((tmp_path / "nf4").iterdir()) == []

    # Who lowers the floor gets what they ask for, and the number. Counted in the file: every tensor but the embedding.
    document = json.loads(
        (quantize(mixture, tmp_path / "low", min_quantized_fraction=0.01) / "quantization.json").read_text()
    )
    sizes = {name: t.numel() for name, t in load_file(mixture / "model.safetensors").items() if "embed" not in name}
    attention = sum(size for name, size in sizes.items() if "self_attn" in name and "norm" not in name)
    assert document["quantized_fraction"] == pytest.approx(attention / sum(sizes.values()), abs=1e-5)
    assert document["bits_per_weight"] == pytest.approx(4.127, rel=0.01)


def test_shards_of_another_run_are_not_measured_as_the_base(tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(128, 64)}, base / "model-00001-of-00009.safetensors")
    with pytest.raises(UsageError, match=r"more than one model.*model-00001-of-00009\.safetensors"):
        quantize(base, tmp_path / "nf4")


def test_a_bitsandbytes_with_other_blocks_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_retrain.lm.base_formats.four_bits.BLOCK_SIZE", 128)
    with pytest.raises(IntegrityError, match=r"4\.1\d+ bits per weight are stored where 4\.06\d* are expected"):
        quantize(tiny_model, tmp_path / "nf4")


def test_an_unsafe_base_is_refused(tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"pytorch_model\.bin"):
        quantize(base, tmp_path / "nf4")


def test_a_base_without_a_chat_template_is_quantized_since_the_line_may_name_one(tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    # Files in a folder of their own are copied too.
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    quantize(base, tmp_path / "nf4")
    assert (tmp_path / "nf4/additional_chat_templates/rag.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "nf4/chat_template.jinja").exists()
    assert (tmp_path / "nf4/generation_config.json").read_text() == '{"eos_token_id": [2, 0]}'

    line_format = ChatFormat(template=template)
    assert load_tokenizer(tmp_path / "nf4", line_format).stop_ids == [2, 0]
    assert load_tokenizer(base, line_format).stop_ids == [2, 0]


def test_a_saved_model_that_loads_with_one_bit_flipped_is_refused(tiny_model, tmp_path, monkeypatch):
    load = loading.load_nf4

    def load_damaged(folder, **options):
        model = load(folder, **options)
        model.get_submodule("model.layers.0.mlp.up_proj").weight.data[0] ^= 1
        return model

    monkeypatch.setattr(loading, "load_nf4", load_damaged)
    with pytest.raises(IntegrityError, match="loads with other tensors"):
        quantize(tiny_model, tmp_path / "nf4")


def test_weights_that_are_not_finite_are_refused(tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight holds numbers that are not finite"):
        quantize(base, tmp_path / "nf4")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_linear_layer_that_is_not_finite_is_refused_though_its_codes_are_like_any_others(tiny_model, tmp_path, value):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="a weight of its up_proj layers holds numbers that are not finite"):
        quantize(base, tmp_path / "nf4")
