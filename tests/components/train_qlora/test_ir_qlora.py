"""IR-QLoRA's elastic connection computes what the paper writes, in every layer and at every rank."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from components.train_qlora.methods.ir_qlora import connect, group_means
from qlora_retrain.lm import loading
from tests.components.train_qlora.adapted import adapted

IDS = torch.arange(24).view(2, 12)


def averaged(x: Tensor, count: int) -> Tensor:
    """Average neighbours of x (..., width) until there are as many numbers as divide both, and repeat these."""
    groups = math.gcd(x.shape[-1], count)
    return x.unflatten(-1, (groups, -1)).mean(-1).repeat_interleave(count // groups, -1)


def written_out(x: Tensor, layer) -> Tensor:
    """The paper's two units, with the averages of the input and of what is between them added."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    beta_1, beta_2 = layer.lora_factors["default"]
    between = linear(x, a) + beta_1 * averaged(x, len(a))
    update = linear(between, b) + beta_2 * averaged(between, len(b))
    return linear(x, layer.base_layer.weight, layer.base_layer.bias) + layer.scaling["default"] * update


# A rank of 6 divides no width of the tiny model: two groups are left.
@pytest.mark.parametrize("rank", [4, 6])
def test_loss_and_gradients_are_those_of_the_formula(base_of, rank: int) -> None:
    results = []
    for is_written_out in (False, True):
        model, _ = adapted(base_of("ir-qlora"), "ir-qlora", rank=rank)
        for layer in model.modules():
            if is_written_out and hasattr(layer, "lora_factors"):
                layer.forward = partial(written_out, layer=layer)
        loss = model(IDS).logits.square().mean()
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, grads), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss)
    assert len(grads) == 3 * 14
    for name, grad in grads.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(4, 64, 32), (6, 64, 32), (5, 64, 32), (4, 4, 6)])
def test_the_matrices_are_averages_of_neighbours(rank: int, inputs: int, outputs: int) -> None:
    x, between = torch.randn(3, inputs), torch.randn(3, rank)
    a, b = torch.randn(rank, inputs), torch.randn(outputs, rank)
    new_a, new_b = connect(a, b, torch.tensor([0.5, -2.0]))
    torch.testing.assert_close(linear(x, new_a), linear(x, a) + 0.5 * averaged(x, rank))
    torch.testing.assert_close(linear(between, new_b), linear(between, b) - 2 * averaged(between, outputs))


def test_a_connection_that_scoring_saw_first_can_be_trained() -> None:
    group_means.cache_clear()
    with torch.inference_mode():
        connect(torch.randn(4, 8), torch.randn(8, 4), torch.zeros(2))
    factors = torch.zeros(2, requires_grad=True)
    a, b = connect(torch.randn(4, 8), torch.randn(8, 4), factors)
    (a.sum() + b.sum()).backward()
    assert factors.grad.tolist() == pytest.approx([4, 8])  # each row of both is an average


def test_it_trains_over_16_bits_too(tiny_model, tmp_path) -> None:
    from components.quantize_model.step import run as quantize
    from qlora_retrain.config.sections import QuantizeConfig

    quantize(QuantizeConfig(format="none"), tiny_model, tmp_path)
    model, _ = adapted(tmp_path, "ir-qlora")
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, loading.load_nf4(tmp_path)(IDS).logits)
