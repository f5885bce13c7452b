"""Loss and gradients of model families other than Llama: how their attention and their logits differ from it."""

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from components.train_qlora import loss, packing
from components.train_qlora.data import IGNORE_INDEX, PaddingCollator
from components.train_qlora.logits import LOGITS_KINDS

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MULTI_HEAD_LATENT: dict[str, Any] = {  # attention over keys and values that a narrower vector is projected to
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "DeepseekV3": {**MULTI_HEAD_LATENT, "first_k_dense_replace": 2},
    "MiniCPM3": MULTI_HEAD_LATENT,
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.05, "attn_logit_softcapping": None},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 8.0},
    "FalconH1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8},
}
CAN_PACK = {"Llama", "Qwen3", "DeepseekV3", "MiniCPM3", "Cohere", "Granite"}
CHANGE_LOGITS = {"Gemma2", "Cohere", "Granite", "FalconH1"}
# All rows begin alike and differ in length; the second half of each is supervised.
ROWS = [
    {"input_ids": [1, 7, 8, *range(10, 10 + n)], "labels": [IGNORE_INDEX] * (2 + n // 2) + [*range(9 + n // 2, 10 + n)]}
    for n in (4, 9, 6)
]


def new_model(family: str, attention: str) -> Any:
    """A tiny random model whose first layer alone is trained."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
    # Ten times the usual 0.02, so that a cap on the logits changes them.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.requires_grad_(False).model.layers[0].requires_grad_(True)
    return model.train()


def take_gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradients by parameter name; the model's own are cleared."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "eager") for family in FAMILIES), *((family, "sdpa") for family in sorted(CAN_PACK))],
)
def test_the_loss_is_that_of_the_models_own_logits_and_so_are_the_gradients(family, attention, monkeypatch):
    # Three positions at a time, or one where the model changes the logits.
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 3 * 4 * SIZES["vocab_size"])
    model = new_model(family, attention)
    expected_loss = 0.0
    for row in ROWS:  # alone, without padding, by the model's own logits
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        row_loss = cross_entropy(
            logits.float(), torch.tensor(row["labels"][1:]), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        row_loss.backward()
        expected_loss += row_loss.item()
    expected = take_gradients(model)

    assert packing.can_pack(model) == (family in CAN_PACK)
    actual_loss = loss.summed_loss(model, PaddingCollator(0)(ROWS))
    actual_loss.backward()
    expected_kind = "transformed" if family in CHANGE_LOGITS else "plain"
    assert LOGITS_KINDS[model.get_output_embeddings()] == expected_kind
    assert actual_loss.item() == pytest.approx(expected_loss, rel=1e-5)

    actual = take_gradients(model)
    assert actual.keys() == expected.keys()
    # Relative to the largest gradient: the families differ by orders of magnitude.
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, rtol=1e-3, atol=1e-5 * largest), name


def test_probing_for_plain_logits_draws_no_random_number(monkeypatch):
    """A resumed run probes in the middle, and its dropout must be that of an uninterrupted run."""
    model = new_model("Llama", "eager")
    # Only the first of the two probes: the second finds the answer in `LOGITS_KINDS`.
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
        monkeypatch.setattr(packing, "can_pack", lambda _: False)
        losses.append(loss.summed_loss(model, PaddingCollator(0)(ROWS)).item())
    assert losses[0] == losses[1]
