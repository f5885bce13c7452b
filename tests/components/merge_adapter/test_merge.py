"""Merging compared with PEFT's own merge, what it must not change, and what it refuses."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.merge_adapter.merge import merge
from qlora_retrain.core.errors import Diverged, IntegrityError, UsageError


def merge_folders(tmp_path: Path, base: Path, nf4: Path, adapter: Path, name: str = "model", **settings: Any) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    merge(base, nf4, adapter, folder, **({"dequantized": True, "max_shard_gib": 5.0} | settings))
    return folder


@pytest.fixture
def edit_adapter(tiny_adapter: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the adapter with another config or other tensors."""

    def edit(config: dict[str, Any] | None = None, tensors: Callable[[dict[str, Any]], Any] | None = None) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(tiny_adapter, folder)
        changed = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        if tensors:
            loaded = load_file(folder / "adapter_model.safetensors")
            tensors(loaded)
            save_file(loaded, folder / "adapter_model.safetensors")
        return folder

    return edit


def merge_with_peft(model: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the merged weights, in fp32, as PEFT computes them."""
    from peft import PeftModel

    state: dict[str, torch.Tensor] = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    return state


def test_merging_into_the_original_is_what_peft_does(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    from qlora_retrain.lm import loading

    ours = load_file(
        merge_folders(tmp_path, tiny_model, tiny_nf4, tiny_adapter, dequantized=False) / "model.safetensors"
    )
    theirs = merge_with_peft(loading.load_base(tiny_model, dtype="float32"), tiny_adapter)
    base = load_file(tiny_model / "model.safetensors")
    assert set(ours) == set(base)

    # bf16 has 8 significant bits, so one rounding is at most 2**-8 of the number.
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.float(), theirs[name], rtol=2**-8, atol=1e-6)
    assert not torch.equal(
        ours["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"]
    )


def test_merging_into_the_dequantized_base_is_what_the_unmerged_model_computes(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    from qlora_retrain.lm import loading

    folder = merge_folders(tmp_path, tiny_model, tiny_nf4, tiny_adapter)
    theirs = merge_with_peft(loading.load_nf4(tiny_nf4, dtype="float32"), tiny_adapter)
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor.float(), theirs[name].float(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dequantized", [False, True])
def test_a_base_whose_file_leaves_out_the_name_of_the_body_is_merged_alike(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path, dequantized: bool
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = {n.removeprefix("model."): t for n, t in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    expected, actual = (
        load_file(
            merge_folders(tmp_path, folder, tiny_nf4, tiny_adapter, name, dequantized=dequantized) / "model.safetensors"
        )
        for folder, name in ((tiny_model, "with"), (base, "without"))
    )
    assert {f"model.{name}" for name in actual} == set(expected)
    assert all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in actual.items())


def test_what_was_not_quantized_stays_the_same_bytes(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    ours = load_file(merge_folders(tmp_path, tiny_model, tiny_nf4, tiny_adapter) / "model.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    untouched = [name for name in base if "proj" not in name]
    assert "model.embed_tokens.weight" in untouched

    # As integers: bit patterns, so that -0.0 and NaN count too.
    for name in untouched:
        assert torch.equal(ours[name].view(torch.int16), base[name].view(torch.int16)), name


def test_merging_twice_gives_the_same_bytes_readable_by_all(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    first, second = (merge_folders(tmp_path, tiny_model, tiny_nf4, tiny_adapter, name) for name in ("one", "two"))
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}
    assert {stat.S_IMODE(p.stat().st_mode) for p in first.iterdir()} == {0o644}


def test_a_sharded_base_and_sharded_output_hold_the_same_tensors(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    from transformers import AutoModelForCausalLM

    whole = merge_folders(tmp_path, tiny_model, tiny_nf4, tiny_adapter, "whole")
    shards = merge_folders(tmp_path, tiny_model, tiny_nf4, tiny_adapter, "shards", max_shard_gib=60_000 / 2**30)
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 60_000 or len(load_file(f)) == 1 for f in files)

    # Every tensor is where the index says, and transformers reads the shards.
    expected = load_file(whole / "model.safetensors")
    sharded = {name: load_file(shards / file)[name] for name, file in index["weight_map"].items()}
    assert set(sharded) == set(expected)
    assert all(torch.equal(sharded[name], expected[name]) for name in sharded)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    loaded = AutoModelForCausalLM.from_pretrained(shards)
    assert torch.equal(loaded.state_dict()["model.norm.weight"], expected["model.norm.weight"])

    # A base in shards gives what the same base in one file gives.
    sharded_base = tmp_path / "sharded-base"
    shutil.copytree(tiny_model, sharded_base)
    (sharded_base / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(sharded_base, max_shard_size="60KB")
    again = merge_folders(tmp_path, sharded_base, tiny_nf4, tiny_adapter, "again")
    assert all(torch.equal(t, expected[name]) for name, t in load_file(again / "model.safetensors").items())


@pytest.mark.slow
def test_the_merged_folder_loads_where_there_is_no_peft_and_no_bitsandbytes(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    folder = merge_folders(tmp_path, tiny_model, tiny_nf4, tiny_adapter)

    # None in sys.modules makes an import fail as if the package were not installed.
    program = (
        "import sys\n"
        "sys.modules['peft'] = sys.modules['bitsandbytes'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        "messages = [{'role': 'user', 'content': 'my money back of order number 1003'}]\n"
        "text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)\n"
        "ids = tokenizer(text, return_tensors='pt', add_special_tokens=False)\n"
        "out = model.generate(**ids, max_new_tokens=8, do_sample=False)\n"
        "print(model.dtype, tokenizer.decode(out[0, ids['input_ids'].shape[1]:], skip_special_tokens=True))\n"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "torch.bfloat16 refund"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.fixture
def random_adapter(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes an untrained adapter of any kind, with random matrices and magnitudes."""
    from peft import LoraConfig, get_peft_model

    from qlora_retrain.lm import loading

    def make(base: Path = tiny_model, **settings: Any) -> Path:
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | settings,
            task_type="CAUSAL_LM",
        )
        # `init_lora_weights=False` makes B random too; it is zero otherwise, and a merge would change nothing.
        torch.manual_seed(1)
        model = get_peft_model(loading.load_base(base), config)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # it starts as the weight's own length, under which a wrong one would not show
                parameter.data.mul_(0.5 + torch.rand_like(parameter))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter"

    return make


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_single_modules_rslora_and_dora_are_merged_as_in_peft(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, random_adapter: Callable[..., Path], rslora: bool, dora: bool
) -> None:
    from qlora_retrain.lm import loading

    adapter = random_adapter(
        use_rslora=rslora,
        use_dora=dora,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        alpha_pattern={"q_proj": 32, "down_proj": 3},
    )
    folder = merge_folders(tmp_path, tiny_model, tiny_nf4, adapter, dequantized=False)
    theirs = merge_with_peft(loading.load_base(tiny_model, dtype="float32"), adapter)
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor.float(), theirs[name], rtol=2**-8, atol=1e-5)


def test_a_dora_merge_into_the_dequantized_base_answers_as_the_unmerged_model_does(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, random_adapter: Callable[..., Path]
) -> None:
    from qlora_retrain.lm import loading

    adapter = random_adapter(use_dora=True)
    ids = torch.arange(3, 43).reshape(2, 20)
    unmerged = loading.attach_adapter(loading.load_nf4(tiny_nf4, dtype="float32"), adapter)(input_ids=ids).logits
    folder = merge_folders(tmp_path, tiny_model, tiny_nf4, adapter)
    ours = loading.load_base(folder, dtype="float32")(input_ids=ids).logits
    base = loading.load_base(tiny_model, dtype="float32")(input_ids=ids).logits

    # What remains is the rounding of the sum to bf16: a small part of what the adapter does.
    assert (ours - unmerged).abs().mean() < 0.05 * (base - unmerged).abs().mean()


@pytest.mark.parametrize("setting", [{"bias": "all"}, {"peft_type": "LOHA"}])
def test_an_adapter_of_another_kind_is_not_supported_yet(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, edit_adapter: Callable[..., Path], setting: dict[str, Any]
) -> None:
    # The message names the value, so that a person finds the setting.
    with pytest.raises(UsageError, match=str(next(iter(setting.values()))).strip("[]'")):
        merge_folders(tmp_path, tiny_model, tiny_nf4, edit_adapter(config=setting))


def test_an_adapter_and_its_config_must_agree_on_dora(
    tmp_path: Path,
    tiny_model: Path,
    tiny_nf4: Path,
    edit_adapter: Callable[..., Path],
    random_adapter: Callable[..., Path],
) -> None:
    with pytest.raises(IntegrityError, match="its lora_magnitude is missing"):
        merge_folders(tmp_path, tiny_model, tiny_nf4, edit_adapter(config={"use_dora": True}))

    # And the reverse: magnitudes in the file that the config does not name would be left out in silence.
    adapter = random_adapter(use_dora=True)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": False}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match="use_dora is not set"):
        merge_folders(tmp_path, tiny_model, tiny_nf4, adapter, "other")


def test_an_adapter_on_an_output_layer_that_is_the_embedding_is_refused(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, edit_adapter: Callable[..., Path]
) -> None:
    def move(tensors: dict[str, Any]) -> None:
        # As an adapter on the output layer would be stored.
        for side in "AB":
            key = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"
            tensors[f"base_model.model.lm_head.lora_{side}.weight"] = tensors.pop(key)

    with pytest.raises(UsageError, match="embeddings and output layer share"):
        merge_folders(tmp_path, tiny_model, tiny_nf4, edit_adapter(tensors=move))


@pytest.fixture
def untied(tmp_path: Path, tiny_model: Path) -> Path:
    """Write the tiny model with an output layer of its own."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "untied"
    shutil.copytree(tiny_model, base)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=False)
    torch.manual_seed(2)
    model.lm_head.weight.data.normal_(std=0.2)
    model.save_pretrained(base)
    return base


def test_an_output_layer_of_its_own_is_kept_or_merged(
    tmp_path: Path, untied: Path, tiny_nf4: Path, random_adapter: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    adapter = random_adapter(untied, target_modules=["lm_head", "q_proj"])
    ours = load_file(merge_folders(tmp_path, untied, tiny_nf4, adapter) / "model.safetensors")
    theirs = merge_with_peft(AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32), adapter)
    torch.testing.assert_close(ours["lm_head.weight"].float(), theirs["lm_head.weight"], rtol=2**-8, atol=1e-5)
    embedding = load_file(untied / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(ours["model.embed_tokens.weight"].view(torch.int16), embedding.view(torch.int16))


def test_an_output_layer_of_its_own_that_was_not_trained_keeps_its_bytes(
    tmp_path: Path, untied: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    base = load_file(untied / "model.safetensors")
    assert not torch.equal(base["lm_head.weight"], base["model.embed_tokens.weight"])

    # base_nf4 has no 4-bit form of these layers, so they come from the original base in both merges.
    for dequantized in (False, True):
        folder = merge_folders(
            tmp_path, untied, tiny_nf4, tiny_adapter, f"merged-{dequantized}", dequantized=dequantized
        )
        ours = load_file(folder / "model.safetensors")
        for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
            assert torch.equal(ours[name].view(torch.int16), base[name].view(torch.int16)), name


def test_a_base_in_float32_is_rounded_to_bf16_everywhere(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    base = tmp_path / "wide"
    shutil.copytree(tiny_model, base)
    # Noise below bf16's precision, so that every tensor must really be rounded.
    torch.manual_seed(3)
    wide = {n: t.float() + 1e-4 * torch.randn(t.shape) for n, t in load_file(base / "model.safetensors").items()}
    save_file(wide, base / "model.safetensors", metadata={"format": "pt"})
    ours = load_file(merge_folders(tmp_path, base, tiny_nf4, tiny_adapter, dequantized=False) / "model.safetensors")
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        assert "proj" in name or torch.equal(tensor, wide[name].bfloat16())


def test_a_base_in_float16_keeps_the_bytes_of_what_is_not_merged(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    base = tmp_path / "half"
    shutil.copytree(tiny_model, base)
    # bf16 numbers of this size fit into fp16, so the file holds the same values under another type.
    half = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    ours = load_file(merge_folders(tmp_path, base, tiny_nf4, tiny_adapter, dequantized=False) / "model.safetensors")
    for name, tensor in ours.items():
        assert tensor.dtype == (torch.bfloat16 if "proj" in name else torch.float16)
        assert "proj" in name or torch.equal(tensor, half[name])


def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, edit_adapter: Callable[..., Path]
) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        # The tiny model has layers 0 and 1.
        for name in [n for n in tensors if "layers.1." in n]:
            tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)

    with pytest.raises(IntegrityError, match=r"no weight in the base, e.g. model.layers.7"):
        merge_folders(tmp_path, tiny_model, tiny_nf4, edit_adapter(tensors=rename))


def test_an_adapter_with_half_a_pair_or_another_rank_is_refused(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, edit_adapter: Callable[..., Path]
) -> None:
    def halve(tensors: dict[str, Any]) -> None:
        tensors.pop(next(name for name in tensors if "lora_B" in name))

    adapter = edit_adapter(tensors=halve)
    with pytest.raises(IntegrityError, match="its lora_B is missing"):
        merge_folders(tmp_path, tiny_model, tiny_nf4, adapter)

    shutil.rmtree(adapter)
    with pytest.raises(IntegrityError, match="says rank 3"):
        merge_folders(tmp_path, tiny_model, tiny_nf4, edit_adapter(config={"r": 3}), "other")


def test_numbers_that_are_not_finite_are_refused(
    tmp_path: Path, tiny_model: Path, tiny_nf4: Path, edit_adapter: Callable[..., Path]
) -> None:
    def poison(tensors: dict[str, Any]) -> None:
        next(iter(tensors.values()))[0, 0] = float("nan")

    adapter = edit_adapter(tensors=poison)
    with pytest.raises(Diverged, match="not finite"):
        merge_folders(tmp_path, tiny_model, tiny_nf4, adapter)
    shutil.rmtree(adapter)

    def inflate(tensors: dict[str, Any]) -> None:
        # Finite in the adapter's fp32; the product of two of them is not.
        for tensor in tensors.values():
            tensor.fill_(1e30)

    with pytest.raises(Diverged, match="merging it into"):
        merge_folders(tmp_path, tiny_model, tiny_nf4, edit_adapter(tensors=inflate), "other")
