"""The adapter is on every linear layer but the head, whatever the layers are called; or the model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from components.train_qlora import adapter
from components.train_qlora.fused_lora import FusedLoRAFunction
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import loading

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _silent_transformers() -> None:
    """Silence what the loaders silence, since these models are built without them."""
    loading.silence_transformers()


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(rank=2, device="cpu", precision="float32", **fields)


def linear_layers(model: Any) -> set[str]:
    head = model.get_output_embeddings()
    return {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def adapted_layers(model: Any) -> set[str]:
    prefix = "base_model.model."
    return {n.split(".lora_A.")[0].removeprefix(prefix) for n, _ in model.named_parameters() if ".lora_A." in n}


def test_layers_whose_names_are_numbers_in_a_list_are_adapted_alone() -> None:
    # The two layers of its MLP are called 0 and 2, and its blocks 0 and 1.
    model = transformers.CTRLLMHeadModel(
        transformers.CTRLConfig(vocab_size=50, n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4)
    ).eval()
    expected = linear_layers(model)
    assert {name.rsplit(".", 1)[-1] for name in expected} >= {"0", "2", "Wq"}
    assert adapted_layers(adapter.attach_new(model, config())) == expected


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module.*", "ignore:.*no parameter was matched")
def test_a_dense_model_that_peft_takes_for_a_mixture_of_experts_is_refused() -> None:
    # PEFT would take gate_proj, up_proj and down_proj for fused experts, which this one has in no layer.
    settings = transformers.Qwen3MoeConfig(**SIZES, num_experts=4, mlp_only_layers=[0, 1])
    model = transformers.Qwen3MoeForCausalLM(settings).eval()
    with pytest.raises(UsageError, match=r"adapts 8 of 14 layers of Qwen3MoeForCausalLM.*layers\.0\.mlp\.down_proj"):
        adapter.attach_new(model, config())

    # The others alone can be trained.
    model = transformers.Qwen3MoeForCausalLM(settings).eval()
    expected = {name for name in linear_layers(model) if "self_attn" in name}
    assert adapted_layers(adapter.attach_new(model, config(target_modules="attention"))) == expected


def test_what_peft_refuses_is_an_error_of_the_setting() -> None:
    settings = transformers.Mamba2Config(
        vocab_size=50, hidden_size=32, num_heads=8, head_dim=8, state_size=8, n_groups=1, num_hidden_layers=1
    )
    with pytest.raises(UsageError, match=r"train\.target_modules: PEFT cannot adapt Mamba2ForCausalLM: .*out_proj"):
        adapter.attach_new(transformers.Mamba2ForCausalLM(settings).eval(), config())


def test_a_model_may_change_the_output_of_a_layer_in_place() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5, bias=False).requires_grad_(False)
    x, a, b = torch.randn(4, 6), torch.randn(2, 6), torch.randn(5, 2)
    fused = [t.clone().requires_grad_() for t in (x, a, b)]
    frozen = [(layer, lambda layer: layer.weight)]
    (output,) = FusedLoRAFunction.apply(fused[0], torch.Tensor.detach, [fused[0]], None, 2.0, frozen, *fused[1:])
    output *= 3
    output.square().sum().backward()

    plain = [t.clone().requires_grad_() for t in (x, a, b)]
    (3 * (layer(plain[0]) + 2.0 * plain[0] @ plain[1].T @ plain[2].T)).square().sum().backward()
    for actual, expected in zip(fused, plain, strict=True):
        assert torch.allclose(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)
