"""The loss and the gradients of other families than Llama's: what they do in attention and after their output layer."""

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from components.train_qlora import loss, packed
from components.train_qlora.rows import IGNORED, Collate

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NARROW_VALUES: dict[str, Any] = {  # attention over what is unpacked from a narrower line: MLA
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "DeepseekV3": {**NARROW_VALUES, "first_k_dense_replace": 2},
    "MiniCPM3": NARROW_VALUES,
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.05, "attn_logit_softcapping": None},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 8.0},
    "FalconH1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8},
}
PACKED = {"Llama", "Qwen3", "DeepseekV3", "MiniCPM3", "Cohere", "Granite"}
AFTER_THE_HEAD = {"Gemma2", "Cohere", "Granite", "FalconH1"}
ROWS = [
    {"input_ids": [1, 7, 8, *range(10, 10 + n)], "labels": [IGNORED] * (2 + n // 2) + [*range(9 + n // 2, 10 + n)]}
    for n in (4, 9, 6)
]


def made(family: str, attention: str) -> Any:
    """A tiny random model whose first layer alone is trained."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.requires_grad_(False).model.layers[0].requires_grad_(True)
    return model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "eager") for family in FAMILIES), *((family, "sdpa") for family in sorted(PACKED))],
)
def test_the_loss_is_that_of_the_models_own_logits_and_so_are_the_gradients(family, attention):
    model = made(family, attention)
    total = 0.0
    for row in ROWS:  # alone, without padding, by the logits that the model gives
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        one = cross_entropy(logits.float(), torch.tensor(row["labels"][1:]), ignore_index=IGNORED, reduction="sum")
        one.backward()
        total += one.item()
    expected = gradients(model)
    assert packed.can_pack(model) == (family in PACKED)
    found = loss.summed_loss(model, Collate(0)(ROWS))
    found.backward()
    assert loss.PROBED[model.get_output_embeddings()] == (family not in AFTER_THE_HEAD)
    assert found.item() == pytest.approx(total, rel=1e-5)
    computed = gradients(model)
    assert computed.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(computed[name], gradient, rtol=1e-3, atol=1e-5 * largest), name


def test_finding_out_what_follows_the_head_draws_no_random_number(monkeypatch):
    """A run that goes on from a checkpoint finds it out in the middle."""
    model = made("Llama", "eager")
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
        monkeypatch.setattr(packed, "can_pack", lambda _: False)
        drawn.append(loss.summed_loss(model, Collate(0)(ROWS)).item())
    assert drawn[0] == drawn[1]
