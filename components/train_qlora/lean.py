"""The hot path, beside the layers: norms and gates that keep less for the backward pass than autograd would.

Each computes forwards exactly what the module that it replaces does; `slim` sees to that with a probe, bit for bit, and
leaves alone whatever differs. What they give is not kept either: the layers that are given it are told how to make it
again from what is kept anyway, which is a third less in all for a hundredth or two of a pass.

With `train.kernels: liger` the kernels of `fused` do the same, where they round alike but for the last bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from components.train_qlora import fused, joined
from qlora_retrain.core import progress


class Norm(torch.autograd.Function):  # type: ignore[misc]
    """RMSNorm with a frozen weight; keeps its input in its own precision where autograd keeps an fp32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Over the last dimension."""
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return normed(x, weight, epsilon)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x alone."""
        x, weight = ctx.saved_tensors
        wide = x.float()
        scale = inverse_size(wide, ctx.epsilon)
        of_unit, unit = (upstream * weight).float(), wide.mul_(scale)
        along = (of_unit * unit).mean(-1, keepdim=True)
        return of_unit.sub_(unit.mul_(along)).mul_(scale).to(x.dtype), None, None


class Gated(torch.autograd.Function):  # type: ignore[misc]
    """silu(gate) * up; keeps the two and not silu(gate), which is made again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, again: Again) -> Tensor:
        """Elementwise."""
        ctx.save_for_backward(gate, up)
        ctx.again = again
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        """Of both."""
        gate, up = ctx.saved_tensors
        half, ctx.again.half = ctx.again.half, None
        half = silu(gate) if half is None else half
        return torch.ops.aten.silu_backward(upstream * up, gate), half.mul_(upstream), None


class Again:
    """silu(gate) * up once more; leaves silu(gate) to `Gated.backward`, which is the next to run."""

    half: Tensor | None = None

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Elementwise."""
        self.half = silu(gate)
        return self.half * up


def inverse_size(wide: Tensor, epsilon: float) -> Tensor:
    """One over the root of the mean square, (..., 1)."""
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension, (Zhang and Sennrich, arXiv 1910.07467, equation 4)."""
    wide = x.float()
    return weight * (wide * inverse_size(wide, epsilon)).to(x.dtype)


def slim(model: Any, kernels: str = "torch") -> int:
    """Have the model's norms and MLPs keep less, where that changes no bit of what they compute; returns how many.

    Args:
        model: In evaluation mode; its forwards are replaced.
        kernels: `torch` or `liger`, which may differ from it in the last bits, or is left out with a word.
    """
    changed = unlike = 0
    for module in model.modules():
        if isinstance(getattr(module, "variance_epsilon", None), float) and hasattr(module, "weight"):
            lean, kernel, width = _norm, fused.norm, module.weight.shape[0]
        elif all(hasattr(module, f"{name}_proj") for name in ("gate", "up", "down")):
            lean, kernel, width = _mlp, fused.mlp, module.gate_proj.in_features
        else:
            continue
        probe = torch.linspace(-3, 3, 15 * width, device=model.device, dtype=model.dtype).view(3, 5, width)
        with torch.no_grad():
            given = module(probe)
            if not torch.equal(given, lean(module, probe)):  # a kernel would be asked about the same formula
                continue
            if kernels == "liger" and not close(given, kernel(module, probe)):
                unlike += 1
            elif kernels == "liger":
                lean = kernel
        module.forward = lean.__get__(module)
        changed += 1
    if unlike:
        progress.say(f"train.kernels: liger computes {unlike} of {changed} norms and gates otherwise; torch does those")
    return changed


def close(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by a few roundings at most, of the largest number in them."""
    few = 8 * torch.finfo(one.dtype).eps * one.abs().max()
    return bool((one - other).abs().max() <= few)


def _norm(module: Any, x: Tensor) -> Tensor:
    how, of = partial(normed, epsilon=module.variance_epsilon), (x, module.weight)
    return joined.made_again_by(how, of, Norm.apply(*of, module.variance_epsilon))


def _mlp(module: Any, x: Tensor) -> Tensor:
    of, again = (module.gate_proj(x), module.up_proj(x)), Again()
    found: Tensor = module.down_proj(joined.made_again_by(again, of, Gated.apply(*of, again)))
    return found
