"""What the streaming quantizer writes has the bytes of transformers and bitsandbytes, for every kind of family."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from components.quantize_model.step import run
from qlora_retrain.config.sections import QuantizeConfig
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import four_bit
from qlora_retrain.lm.streaming_quantizer import load_quantized

SIZES = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
SMALL_GPT: dict[str, Any] = {"vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

# Family, what differs from SIZES, and why the family is here.
FAMILIES = [
    ("Llama", {"tie_word_embeddings": True}),
    ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("Mistral", {"sliding_window": 16, "head_dim": 16}),
    ("Qwen2", {}),  # biases of the queries, keys and values
    ("Qwen3", {"head_dim": 16}),
    ("Gemma2", {"head_dim": 16}),
    ("Gemma3", {"head_dim": 16, "sliding_window": 16}),  # norms around the layers, tied
    ("Phi", {}),  # a head with a bias
    ("Phi3", {"original_max_position_embeddings": 64}),  # fused matrices
    ("Granite", {}),
    ("Olmo2", {}),
    ("StableLm", {}),
    ("GPTNeoX", {"num_key_value_heads": None}),
    ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    ("Bloom", {"n_layer": 2, "n_head": 4}),  # a body whose name some files leave out
    ("GPT2", SMALL_GPT),  # Conv1D, transposed
    ("Qwen3Moe", {"head_dim": 16, **EXPERTS}),  # transformers fuses the experts of the files
    ("Mixtral", {"num_local_experts": 4}),
]


def write_model(
    folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "5GB", **options: Any
) -> Path:
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    causal = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, causal)(config_class(**{**SIZES, **options}))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def bitsandbytes_settings(config: QuantizeConfig) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.format,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, config.compute_dtype),
    )


def save_by_transformers(base: Path, folder: Path, device: str = "cpu", **settings: Any) -> dict[str, bytes]:
    """Quantize and save as anybody would; return the files."""
    config = QuantizeConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=getattr(torch, config.compute_dtype),
        attn_implementation="eager",
        device_map={"": device},
        quantization_config=bitsandbytes_settings(config),
    )
    return save(model, folder)


def save_streamed(base: Path, folder: Path, **settings: Any) -> dict[str, bytes]:
    config = QuantizeConfig(**settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_quantized(base, bitsandbytes_settings(config), folder, device=device, dtype=config.compute_dtype)
    assert list(folder.iterdir()) == []  # the mapped files have no names
    return save(model, folder)


def save(model: Any, folder: Path) -> dict[str, bytes]:
    model.config._name_or_path = ""
    model.config.return_dict = True
    model.save_pretrained(folder, max_shard_size="5GB")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_every_family_gets_the_bytes_that_transformers_writes(tmp_path, family, options):
    base = write_model(tmp_path / "base", family, **options)
    files = save_streamed(base, tmp_path / "streamed")
    expected = save_by_transformers(base, tmp_path / "transformers")
    assert files.keys() == expected.keys() >= {"config.json", "model.safetensors"}
    assert [name for name in files if files[name] != expected[name]] == []
    assert any(name.endswith(".weight.absmax") for name in load_file(tmp_path / "streamed/model.safetensors"))


# Biases, norms around the layers, fused matrices, other names, experts that stay as they are.
OWN_LAYERS = ("Llama", "Gemma3", "Phi3", "GPTNeoX", "OPT", "Bloom", "Mixtral")


@pytest.mark.parametrize(("family", "options"), [family for family in FAMILIES if family[0] in OWN_LAYERS][1:])
def test_every_family_is_stored_in_layers_of_our_own_and_loads_again(tmp_path, family, options):
    base = write_model(tmp_path / "base", family, **options)
    (tmp_path / "int4").mkdir()
    # The step loads what it has saved, and compares every bit.
    numbers = run(QuantizeConfig(format="int4", min_quantized_fraction=0.0), base, tmp_path / "int4").numbers
    assert numbers["bits_per_weight"] == 5
    stored = load_file(tmp_path / "int4/model.safetensors")
    packed = {name.removesuffix(".weight") for name, tensor in stored.items() if tensor.dtype == torch.uint8}
    assert packed
    assert packed == {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    assert not any(name.endswith(("lm_head", "embed_out")) for name in packed)


@pytest.mark.parametrize(
    ("dtype", "quant_type", "double_quant", "compute_dtype"),
    [
        (torch.float32, "nf4", True, "bfloat16"),
        (torch.float32, "fp4", False, "float16"),
        (torch.float16, "nf4", False, "bfloat16"),
        (torch.float16, "fp4", True, "float16"),
        (torch.bfloat16, "fp4", True, "bfloat16"),
        (torch.bfloat16, "nf4", True, "float16"),
    ],
)
def test_every_setting_gets_the_bytes_that_transformers_writes(
    tmp_path, dtype, quant_type, double_quant, compute_dtype
):
    base = write_model(tmp_path / "base", "Qwen2", dtype)
    settings = {"format": quant_type, "double_quant": double_quant, "compute_dtype": compute_dtype}
    expected = save_by_transformers(base, tmp_path / "transformers", **settings)
    assert save_streamed(base, tmp_path / "streamed", **settings) == expected


def test_a_base_in_shards_gets_the_same_bytes_and_so_does_its_result_in_shards(tmp_path, monkeypatch):
    single = write_model(tmp_path / "single", "Llama")
    shards = write_model(tmp_path / "shards", "Llama", max_shard_size="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    files = [save_streamed(base, tmp_path / f"{base.name}-nf4") for base in (single, shards)]
    assert files[0] == files[1]

    monkeypatch.setattr("components.quantize_model.pack_base.SHARD_SIZE", "20KB")
    (tmp_path / "result").mkdir()
    run(QuantizeConfig(), shards, tmp_path / "result")
    parts = [load_file(path) for path in sorted((tmp_path / "result").glob("*.safetensors"))]
    whole = load_file(tmp_path / "single-nf4/model.safetensors")
    joined = {name: tensor for part in parts for name, tensor in part.items()}
    assert len(parts) > 2
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)


def test_a_bitsandbytes_with_another_code_is_refused(tiny_model, tmp_path, monkeypatch):
    bounds_and_codes = four_bit.bounds_and_codes

    def others(quant_type):
        bounds, code_of_rank = bounds_and_codes(quant_type)
        return bounds * bounds.dtype.type(0.999), code_of_rank

    monkeypatch.setattr(four_bit, "bounds_and_codes", others)
    with pytest.raises(IntegrityError, match="gives other nf4 codes than expected"):
        run(QuantizeConfig(), tiny_model, tmp_path)


def test_a_mixture_is_refused_before_a_weight_is_read(tmp_path):
    base = write_model(tmp_path / "base", "Mixtral", num_local_experts=4)
    weights = load_file(base / "model.safetensors")
    # Loading these would end with other words: a weight is missing.
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "nf4").mkdir()
    with pytest.raises(UsageError, match=r"only .* are in linear layers.*\.experts\."):
        run(QuantizeConfig(), base, tmp_path / "nf4")
    with pytest.raises(IntegrityError, match=r"1 weights are missing"):
        run(QuantizeConfig(min_quantized_fraction=0.0), base, tmp_path / "nf4")


def test_conv1d_weights_are_refused_since_nothing_could_be_merged_into_them(tmp_path):
    base = write_model(tmp_path / "base", "GPT2", **SMALL_GPT)
    (tmp_path / "nf4").mkdir()
    with pytest.raises(UsageError, match=r"8 of 8 quantized weights of GPT2LMHeadModel have other names or another"):
        run(QuantizeConfig(), base, tmp_path / "nf4")


def test_a_full_disk_is_reported_as_such_and_not_as_damaged_weights(tiny_model, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match="No space left"):
        run(QuantizeConfig(), tiny_model, tmp_path)


PROGRAM = """
import sys
from pathlib import Path
from components.quantize_model.step import run
from qlora_retrain.config.sections import QuantizeConfig
config = QuantizeConfig(format=sys.argv[5])
run(config, Path(sys.argv[1]), Path(sys.argv[2]))  # all of the libraries' memory
print("ready", flush=True)
sys.stdin.readline()
run(config, Path(sys.argv[3]), Path(sys.argv[4]))
"""
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 1024, 2048, 12, 2048


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous resident memory of a process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


@pytest.mark.slow
@pytest.mark.parametrize("base_format", ["nf4", pytest.param("int4", marks=pytest.mark.soak)])
def test_the_whole_step_holds_a_few_tensors_however_large_the_model(tmp_path, base_format):
    tiny = write_model(tmp_path / "tiny", "Llama")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS}
    config = transformers.LlamaConfig(**{**SIZES, **sizes, "vocab_size": VOCABULARY, "tie_word_embeddings": True})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    numbers = torch.randn(VOCABULARY * HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = {
        name: numbers[: size.numel()].clone().view(size)
        for name, size in ((name, parameter.shape) for name, parameter in model.named_parameters())
    }
    config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    del weights

    folders = [tmp_path / "tiny-nf4", tmp_path / "nf4"]
    for folder in folders:
        folder.mkdir()
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).rename(base / name)
    command = [sys.executable, "-c", PROGRAM, *map(str, (tiny, folders[0], base, folders[1])), base_format]
    # One thread, so that the chunks' temporaries do not depend on the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if base_format == "int4":
        # What malloc keeps of freed memory, up to 90 MiB, differs from run to run and not by the size of the model.
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[3],
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while process.stdout.readline() not in ("ready\n", ""):
            pass
        before = peak = anonymous_bytes(process.pid)
        process.stdin.write("go\n")
        process.stdin.close()
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.01)
    assert process.returncode == 0

    # The 4-bit form alone would be far above the bound; 16 MiB are for the temporaries of chunks.
    bound = 4 * 2 * VOCABULARY * HIDDEN + (16 << 20)
    assert (folders[1] / "model.safetensors").stat().st_size > 1.7 * bound
    assert 0 < peak - before < bound


@pytest.mark.gpu
def test_on_a_gpu_the_bytes_are_those_that_transformers_writes_on_a_gpu(tmp_path):
    for quant_type in ("nf4", "fp4"):
        base = write_model(tmp_path / f"base-{quant_type}", "Qwen2")
        files = save_streamed(base, tmp_path / f"streamed-{quant_type}", format=quant_type)
        expected = save_by_transformers(base, tmp_path / quant_type, device="cuda", format=quant_type)
        assert files == expected
