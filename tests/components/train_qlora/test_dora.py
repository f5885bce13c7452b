"""DoRA's loss and gradients are PEFT's, and what the merge writes is what training computed."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from components.evaluate import intruders
from components.merge_adapter.merge import merge
from components.train_qlora import adapter
from qlora_retrain.lm import loading
from qlora_retrain.lm.dora import row_norms, scale_rows
from tests.components.train_qlora.adapted import adapted

IDS = torch.arange(3, 27).view(2, 12)


def backward(model) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss, and the gradients by parameter."""
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_are_pefts(nf4) -> None:
    ours, _ = adapted(nf4, "dora")
    settings = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=ours.peft_config["default"].target_modules)
    theirs = get_peft_model(loading.load_nf4(nf4), settings)
    set_peft_model_state_dict(theirs, adapter.copy_weights(ours))

    (loss, grads), (expected_loss, expected_grads) = backward(ours), backward(theirs)
    assert abs(loss - expected_loss) < 1e-5
    assert sorted(grads) == sorted(expected_grads)
    assert any("magnitude" in name for name in grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-3, atol=1e-5)


def test_the_merge_writes_what_training_computed(nf4, tiny_model, tmp_path) -> None:
    model, config = adapted(nf4, "dora")
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    adapter.export(model.eval(), tmp_path / "adapter", config)
    merge(tiny_model, nf4, tmp_path / "adapter", tmp_path / "merged", dequantized=True, max_shard_gib=1.0)
    with torch.no_grad():
        expected, logits = model(IDS).logits, loading.load_base(tmp_path / "merged", dtype="float32")(IDS).logits
    # The merged weights are rounded to bf16.
    assert (logits - expected).abs().max() < 0.05 * expected.std()


def test_intruders_are_counted_in_the_weights_with_their_magnitudes(nf4, tmp_path) -> None:
    model, config = adapted(nf4, "dora")
    adapter.export(model.eval(), tmp_path, config)
    loaded = loading.attach_adapter(loading.load_nf4(nf4), tmp_path)
    magnitudes = {n: t for n, t in adapter.load_weights(tmp_path).items() if "magnitude" in n}
    for name, base, tuned in intruders.weight_pairs(loaded):
        assert not torch.allclose(base, tuned)
        expected = magnitudes[f"base_model.model.{name}.lora_magnitude_vector"]
        torch.testing.assert_close(torch.linalg.vector_norm(tuned, dim=1), expected, rtol=1e-4, atol=1e-6)


def test_a_bias_is_not_scaled() -> None:
    weight, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    x, bias, row_scale = torch.randn(3, 5), torch.randn(6), torch.rand(6)
    torch.testing.assert_close(scale_rows(x @ weight.T + bias, row_scale, bias), (x @ weight.T) * row_scale + bias)
    torch.testing.assert_close(row_norms(weight, a, b, 2.0), (weight + 2 * b @ a).norm(dim=1))
