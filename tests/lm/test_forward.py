"""Logits in chunks: as those of the whole at once, with one run of the body, and never more bytes than a chunk has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from qlora_retrain.lm import forward, loading

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Gemma2": {**SIZES, "final_logit_softcapping": 2.0},  # after the output layer
    "Cohere": {**SIZES, "logit_scale": 0.25},
    "GPT2": {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    # Its causal model calls the decoder within its body.
    "OPT": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 0, 0, 0]])
POSITIONS = [(0, 1), (0, 5), (1, 2), (0, 2), (1, 0)]


def new_model(family: str) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.inference_mode()
def chunks_of(model: Any, **inputs: Any) -> list[torch.Tensor]:
    return list(forward.logit_chunks(model, {"input_ids": IDS, "use_cache": False, **inputs}, POSITIONS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_chunks_are_the_logits_of_the_whole(monkeypatch: pytest.MonkeyPatch, family: str, rows: int) -> None:
    model = new_model(family)
    monkeypatch.setitem(forward.CHUNK_BYTES, "cpu", 4 * 50 * rows + 3)
    layer_runs: list[Any] = []
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers[0].register_forward_pre_hook(lambda *_: layer_runs.append(1))

    chunks = chunks_of(model)
    assert [len(chunk) for chunk in chunks] == {1: [1] * 5, 2: [2, 2, 1], 100: [5]}[rows]
    assert len(layer_runs) == 1
    assert "forward" not in vars(model.get_decoder())
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
    expected = torch.stack([whole[position] for position in POSITIONS])
    assert torch.allclose(torch.cat(chunks), expected, atol=1e-5)


def test_an_adapter_and_a_cache_are_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forward.CHUNK_BYTES, "cpu", 1)
    loading.silence_transformers()
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = new_model("Llama")
    model = get_peft_model(model, lora).eval()
    cache = transformers.DynamicCache()
    chunks = chunks_of(model, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == IDS.shape[1]
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
    assert torch.allclose(torch.cat(chunks), torch.stack([whole[position] for position in POSITIONS]), atol=1e-5)


def test_a_family_whose_body_has_no_name_computes_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forward.CHUNK_BYTES, "cpu", 1)
    model = new_model("Llama")
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self)
    (logits,) = chunks_of(model)
    assert torch.equal(logits, chunks_of(model)[0])
    assert len(logits) == len(POSITIONS)


def test_a_body_that_is_called_in_parts_computes_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forward.CHUNK_BYTES, "cpu", 1)
    model = new_model("OPT")
    # The causal model calls the decoder inside of this module, and never the module itself.
    monkeypatch.setattr(type(model), "get_decoder", lambda self: self.model)
    assert [len(chunk) for chunk in chunks_of(model)] == [len(POSITIONS)]


@torch.inference_mode()
def test_a_score_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("Gemma2")
    sequences = [forward.TargetSequence.from_mask(ids, [True] * len(ids)) for ids in ([3, 4, 5, 6], [7, 8], [9])]
    whole = forward.score_sequences(model, sequences, 64)
    targets = [(0, 5), (2, 7), (2, 8), (4, 1)]
    values = forward.target_logprobs(model, {"input_ids": IDS, "use_cache": False}, POSITIONS, targets)
    monkeypatch.setitem(forward.CHUNK_BYTES, "cpu", 1)
    for ours, expected in zip(forward.score_sequences(model, sequences, 64), whole, strict=True):
        assert ours.loss_nats == pytest.approx(expected.loss_nats, rel=1e-6)
        assert ours.hits == expected.hits
    chunked = forward.target_logprobs(model, {"input_ids": IDS, "use_cache": False}, POSITIONS, targets)
    assert chunked == pytest.approx(values, rel=1e-6)
    logprobs = model(input_ids=IDS).logits.float().log_softmax(-1)
    expected_values = [float(logprobs[POSITIONS[index]][token]) for index, token in targets]
    assert values == pytest.approx(expected_values, rel=1e-4)


def test_logits_over_a_large_vocabulary_never_exceed_a_chunk() -> None:
    sizes = {**SIZES, "vocab_size": 262_144, "hidden_size": 8, "head_dim": 2, "num_hidden_layers": 1}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes)).float().eval()
    positions = [(0, k) for k in range(200)]
    with torch.inference_mode():
        for logits in forward.logit_chunks(
            model, {"input_ids": torch.ones(1, 200, dtype=torch.long), "use_cache": False}, positions
        ):
            assert logits.shape[1] == 262_144
            assert logits.nbytes <= forward.CHUNK_BYTES["cpu"] < 4 * 262_144 * 200 / 3
