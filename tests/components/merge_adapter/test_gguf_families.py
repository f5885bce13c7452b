"""Every family in GGUF: llama.cpp computes what transformers computes, and the file is read back as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from components.merge_adapter import gguf_file, gguf_tokenizer
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat, gguf_families, loading
from tests.components.merge_adapter import llama_cpp
from tests.components.merge_adapter.sentencepiece import TEXTS, write_sentencepiece

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 512, "initializer_range": 0.2, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 16,
    "long_factor": [1.5 + i / 2 for i in range(8)], "short_factor": [1 + i / 10 for i in range(8)],
}  # fmt: skip
PARTIAL = LONG | {"partial_rotary_factor": 0.75, **{f"{n}_factor": LONG[f"{n}_factor"][:6] for n in ("long", "short")}}  # type: ignore[index]
GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 16}
GEMMA_3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
# The model type of transformers, and what is special of a published model.
FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Llama 2": ("llama", {}),
    "Llama 3.2": ("llama", {"rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "Vicuna 16k": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
    "Mistral Nemo": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 32}),
    "Gemma 2": ("gemma2", {**GEMMA, "num_hidden_layers": 4}),
    "Gemma 3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 6, "rope_parameters": GEMMA_3_ROPE}),
    "Phi-4": ("phi3", {"sliding_window": None}),
    "Phi-3.5": ("phi3", {"sliding_window": None, "rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "Phi-4-mini": (
        "phi3",
        {
            "sliding_window": None, "tie_word_embeddings": True, "rope_parameters": PARTIAL,
            "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16,
        },
    ),
    "Granite": (
        "granite",
        {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
}  # fmt: skip
# Longer than the windows, so that what a window leaves out shows.
LENGTHS = (1, 2, 15, 16, 17, 18, 40)


def write_random_model(model_type: str, settings: Mapping[str, Any], folder: Path) -> None:
    """Write a tiny random model beside its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms of 1 and biases of 0 would hide a wrong place
            parameter.data.add_(torch.empty_like(parameter).normal_(std=0.2))
    model.save_pretrained(folder)


def random_ids(count: int) -> torch.Tensor:
    return torch.randint(3, 500, (1, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder, path = tmp_path / "model", tmp_path / "model.gguf"
    shutil.copytree(tiny_model, folder)
    write_random_model(*FAMILIES[name], folder)
    gguf_file.refuse_unsupported(folder, ["gguf-f16"])
    gguf_file.write_gguf(folder, path, "gguf-f16")

    ids = random_ids(LENGTHS[-1])
    logits = loading.load_base(folder, dtype="float32")(ids).logits[0].detach()
    read_back = gguf_file.load_gguf(folder, path, dtype="float32")(ids).logits[0].detach()
    # The vectors are stored in fp32, and the matrices of this model lose nothing in f16 that counts.
    assert float((read_back - logits).norm() / logits.norm()) < 1e-4
    llama = llama_cpp.start_server(path)
    assert llama_cpp.compare(llama, logits, ids[0].tolist(), LENGTHS) < 0.005


@pytest.mark.parametrize("prefix", ["always", "first", "never"])
def test_llama_cpp_cuts_a_chat_into_the_tokens_of_a_sentencepiece_tokenizer(tmp_path: Path, prefix: Any) -> None:
    # Llama 2 puts a space before every text between special tokens, Mistral before the whole text, Gemma nowhere.
    folder = tmp_path / "model"
    folder.mkdir()
    write_sentencepiece(folder, prefix)
    write_random_model("llama", {}, folder)
    gguf_file.refuse_unsupported(folder, ["gguf-f16"])
    gguf_file.write_gguf(folder, tmp_path / "model.gguf", "gguf-f16")
    tokenizer, llama = chat.load_tokenizer(folder), llama_cpp.start_server(tmp_path / "model.gguf")
    for text in TEXTS:
        turns = [("user", text), ("assistant", f"it is {text}"), ("user", text)]
        rendered = tokenizer.render([{"role": role, "content": content} for role, content in turns])
        ids = tokenizer.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert llama.tokenize(rendered) == ids


@pytest.mark.parametrize("begins_chats", [True, False])
def test_llama_cpp_begins_a_chat_with_the_token_of_the_beginning_only_where_training_did(
    tmp_path: Path, begins_chats: bool
) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    # The tokenizer puts <s> before plain text; Zephyr's template, which is rendered without that, has none.
    write_sentencepiece(tmp_path, "always")
    inner = AutoTokenizer.from_pretrained(tmp_path)
    inner.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    marks = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}<|assistant|>\n"
    inner.chat_template = ("{{ bos_token }}" if begins_chats else "") + marks
    inner.save_pretrained(tmp_path)
    write_random_model("llama", {}, tmp_path)
    gguf_file.write_gguf(tmp_path, tmp_path / "model.gguf", "gguf-f16")

    ids = chat.load_tokenizer(tmp_path).prompt_ids([{"role": "user", "content": "where is my card"}])
    assert (ids[0] == 1) is begins_chats
    llama = llama_cpp.start_server(tmp_path / "model.gguf")
    assert llama.chat_ids([{"role": "user", "content": "where is my card"}]) == list(ids)


def test_a_byte_level_tokenizer_is_cut_as_before(tiny_model: Path, tmp_path: Path) -> None:
    gguf_file.write_gguf(tiny_model, tmp_path / "model.gguf", "gguf-f16")
    tokenizer, llama = chat.load_tokenizer(tiny_model).tokenizer, llama_cpp.start_server(tmp_path / "model.gguf")
    # Special tokens and digits: the places where two tokenizers differ first.
    text = "<|im_start|>user\nwhere is the parcel of order number 1003?<|im_end|>\n<|im_start|>assistant\n"
    assert llama.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_frequencies_in_the_files_of_llama_2_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, path = tmp_path / "model", tmp_path / "model.gguf"
    shutil.copytree(tiny_model, folder)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | frequencies, weights, metadata={"format": "pt"})
    gguf_file.write_gguf(folder, path, "gguf-f16")
    # llama.cpp refuses a file with more tensors than it knows.
    assert not [tensor.name for tensor in gguf.GGUFReader(path).tensors if "rot" in tensor.name]
    gguf_file.load_gguf(folder, path, dtype="float32")


PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_white_space_that_a_token_takes_away_is_taken_away_by_llama_cpp_too(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, "always")
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
    document["added_tokens"][2]["rstrip"] = True  # </s>
    marks = ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    first_id = len(document["model"]["vocab"])
    document["added_tokens"] += [
        {"id": first_id + i, "content": mark, "rstrip": mark != "<|endoftext|>", **plain}
        for i, mark in enumerate(marks)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "chat_template.jinja").write_text(PHI_3)
    write_random_model("llama", {}, tmp_path)
    assert len(gguf_file.write_gguf(tmp_path, tmp_path / "model.gguf", "gguf-f16")) == 1  # the types alone

    messages = [{"role": "user", "content": "where is my card"}]
    ids = chat.load_tokenizer(tmp_path).prompt_ids(messages)
    assert llama_cpp.start_server(tmp_path / "model.gguf").chat_ids(messages) == list(ids)


def test_what_a_chat_needs_beside_the_file_is_told(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    chat.ChatFormat(system="Be brief.", template_kwargs={"tone": "dry"}, date="2026-01-31").write(folder)
    _, *notes = gguf_file.write_gguf(folder, tmp_path / "model.gguf", "gguf-f16")
    assert "training had a system turn" in notes[0]
    assert '--chat-template-kwargs \'{"tone": "dry"}\'' in notes[1]
    assert "was 2026-01-31 in training" in notes[2]


@pytest.mark.parametrize(("prefix", "begins_with"), [("first", "<|"), ("first", "{{ bos_token }}<|"), ("always", "<|")])
def test_a_space_before_a_chat_that_llama_cpp_leaves_out_is_told(tmp_path: Path, prefix: Any, begins_with: str) -> None:
    write_sentencepiece(tmp_path, prefix)
    turns = "{% for m in messages %}{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}assistant|>"
    (tmp_path / "chat_template.jinja").write_text(begins_with + turns)
    write_random_model("llama", {}, tmp_path)
    _, *notes = gguf_file.write_gguf(tmp_path, tmp_path / "model.gguf", "gguf-f16")
    assert bool(notes) is (prefix == "first" and begins_with == "<|"), notes


def test_merges_that_no_scores_give_are_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, "never")
    document = gguf_tokenizer.backend_tokenizer(tmp_path)
    merges = document["model"]["merges"]
    merges.append(merges[0])
    writer = gguf.GGUFWriter(None, "llama")
    with pytest.raises(UsageError, match="one score for a token, and the tokenizer merges"):
        gguf_tokenizer._add_sentencepiece(writer, document, 512)


def test_the_end_of_a_text_and_of_a_turn_are_both_in_the_file(tmp_path: Path) -> None:
    # Gemma's turns end with a token that is not its end-of-sequence token.
    write_sentencepiece(tmp_path, "never")
    write_random_model("gemma2", GEMMA, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    gguf_file.write_gguf(tmp_path, tmp_path / "model.gguf", "gguf-f16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    ends = {name: reader.get_field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
    assert {name: field.contents() if field else None for name, field in ends.items()} == {"eos": 2, "eot": 4}
    template = reader.get_field("tokenizer.chat_template")
    assert template is not None
    assert "<start_of_turn>" in template.contents()


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 144, "head_dim": 256}, "no place for query_pre_attn_scalar"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}, "no place for attn_logit_softcapping"),
        ("Gemma2ForCausalLM", {"tie_word_embeddings": False}, "no place for tie_word_embeddings"),
        (
            "Gemma3ForCausalLM",
            {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
            "no place for layer_types",
        ),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "yarn"}},
            "default or longrope in this family; the base has yarn",
        ),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": GEMMA_3_ROPE | {"sliding_attention": {"rope_type": "linear", "factor": 4.0}}},
            "no place for rope_parameters.sliding_attention.rope_type: linear",
        ),
        ("Gemma2ForCausalLM", {"sliding_window": None}, "no place for sliding_window"),
        ("Qwen2ForCausalLM", {"rope_parameters": LLAMA_3}, "default or linear in this family; the base has llama3"),
        ("LlamaForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "no place for partial_rotary_factor"),
        ("Gemma3ForConditionalGeneration", {}, "the base is Gemma3ForConditionalGeneration"),
    ],
)
def test_a_model_that_llama_cpp_would_read_in_another_way_is_refused(
    architecture: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        gguf_families.architecture({"architectures": [architecture], **settings})


def test_the_largest_gemma_is_taken_with_the_scale_of_its_own() -> None:
    config = {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
    gguf_families.architecture({"architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 144, **config})


def test_a_window_that_llama_cpp_does_not_apply_is_told() -> None:
    phi = {"architectures": ["Phi3ForCausalLM"], "sliding_window": 2047, "max_position_embeddings": 4096}
    (text,) = gguf_families.reading_differences(phi)
    assert "has one of 2047 tokens" in text
    gemma = {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 512, "max_position_embeddings": 32_768}
    assert gguf_families.reading_differences(gemma) == []
