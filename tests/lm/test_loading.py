"""Every form of a model loads as it should, and a folder that is unsafe, damaged or of another form is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.quantize_model.step import run as quantize
from qlora_retrain.config.sections import QuantizeConfig
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import loading


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base_model"))


@pytest.fixture(scope="module")
def nf4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_nf4")
    quantize(QuantizeConfig(), tiny_model, folder)
    return folder


IDS = torch.tensor([[1, 5, 9, 200, 2]])


def test_the_base_loads_in_the_precision_asked_for_and_in_evaluation_mode(base):
    model = loading.load_base(base, dtype="float32")
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config._attn_implementation == "eager"


def test_a_family_without_sdpa_computes_with_eager_attention_and_says_so(base, capsys):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=512, num_key_value_heads=1, head_dim=16, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(base)
    # As a plan on a machine with a GPU has it.
    model = loading.load_base(base, dtype="float32", attn_implementation="sdpa")
    assert model.config._attn_implementation == "eager"
    assert "base_model: Gemma2ForCausalLM has no sdpa attention" in capsys.readouterr().out
    assert torch.equal(model(IDS).logits, loading.load_base(base, dtype="float32")(IDS).logits)


def test_a_family_with_sdpa_computes_with_it(base):
    model = loading.load_base(base, dtype="float32", attn_implementation="sdpa")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["modeling_tiny.py", "pytorch_model.bin", "sub/state.pt", "old.PKL", "last.ckpt"])
def test_a_folder_with_code_or_pickles_is_refused(base, name):
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_bytes(b"")
    with pytest.raises(IntegrityError, match=name):
        loading.load_base(base)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_names_its_own_code_is_refused(base, name):
    # transformers would import the class from a file of the folder, with remote code allowed.
    document = json.loads((base / name).read_text())
    (base / name).write_text(json.dumps({**document, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(IntegrityError, match="auto_map"):
        loading.load_base(base)


def test_damaged_weights_are_refused(base):
    # Cut in the middle of the tensors; the header is whole.
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(IntegrityError, match="damaged"):
        loading.load_base(base)


def test_missing_weights_are_refused_where_transformers_would_fill_in_random_ones(base):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"1 weights are missing, e\.g\. model\.layers\.1\.mlp\.up_proj"):
        loading.load_base(base)


def test_weights_of_another_shape_are_refused(base):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(63)  # config.json says 64
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="do not fit"):
        loading.load_base(base)


def test_a_folder_without_a_model_is_refused(tmp_path, base):
    with pytest.raises(UsageError, match=r"no config\.json"):
        loading.load_base(tmp_path)
    (base / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="cannot be loaded"):
        loading.load_base(base)


def test_the_16_bit_and_the_4_bit_base_cannot_be_confused(base, nf4):
    with pytest.raises(UsageError, match="already quantized"):
        loading.load_base(nf4)
    document = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**document, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UsageError, match=r"another quantization than .* quantize\.format \(none, nf4, fp4, int4, "):
        loading.load_nf4(base)


def test_dequantized_and_packed_4_bit_weights_are_the_same_model(nf4):
    packed, dequantized = loading.load_nf4(nf4, dtype="bfloat16"), loading.load_nf4(nf4, dtype="float32")
    assert packed.dtype == torch.bfloat16
    assert dequantized.dtype == torch.float32

    # One computes in bf16, the other in fp32, so the losses are close and not equal.
    with torch.no_grad():
        loss = [float(model(input_ids=IDS, labels=IDS).loss) for model in (packed, dequantized)]
    assert loss[0] == pytest.approx(loss[1], rel=0.01)


def test_a_folder_that_is_no_adapter_is_refused(nf4, tmp_path):
    with pytest.raises(UsageError, match=r"no adapter_config\.json"):
        loading.attach_adapter(loading.load_nf4(nf4), tmp_path)
