"""The hot path, first half: frozen layers and their adapters in one forward and one backward.

    y = x Wᵀ + s · drop(x) Aᵀ Bᵀ        for every layer that is given the same x (q, k, v; gate, up)

Written by hand because autograd, over PEFT's modules, keeps x and a dropped copy of it for every layer and walks the
result of a layer five times. Here x is kept once for all layers that share it, W is unpacked when it is needed and
forgotten at once, and what dropout leaves out is drawn once for all. The weights stay in PEFT's modules: only
`forward` is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from torch import Tensor
from torch.nn import Module

ADAPTER = "default"  # PEFT's name for the only adapter
AGAIN = "made_again_by"  # a tensor's attribute


def join(model: PeftModel) -> int:
    """Have every adapted layer computed by `Joined`, together with those that share its input; returns the groups.

    Who shares an input is found by looking: a forward pass of two tokens, noting which layers get the same tensor.
    """
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    groups: dict[int, list[Module]] = {}
    seen: list[Tensor] = []  # kept alive, so that no two of them have the same id

    def note(layer: Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        groups.setdefault(id(args[0]), []).append(layer)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for members in groups.values():
        shared = Group(members)
        for i, layer in enumerate(members):
            layer.forward = shared.forward_of(i)
    return len(groups)


class Group:
    """Layers that are given the same tensor: computed when the first of them is asked, handed out to the others."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.dropout: Any = layers[0].lora_dropout[ADAPTER]
        self.given: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def forward_of(self, number: int) -> Callable[[Tensor], Tensor]:
        """What takes the place of a layer's own forward."""

        def forward(x: Tensor) -> Tensor:
            if number == 0 or x is not self.given or number not in self.outputs:
                self.outputs = dict(enumerate(self.compute(x)))
                self.given = x  # not before: a layer that is computed twice may be left in the middle
            found = self.outputs.pop(number)
            if not self.outputs:
                self.given = None
            return found

        return forward

    def compute(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every layer's output."""
        probability = getattr(self.dropout, "p", 0.0) if self.dropout.training else 0.0
        dropped = drawn(x.numel(), probability, x.device) if probability else None
        scale = self.layers[0].scaling[ADAPTER] / (1.0 - probability)
        frozen = [layer.base_layer for layer in self.layers]
        matrices = [m for layer in self.layers for m in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)]
        how, of = getattr(x, AGAIN, (Tensor.detach, (x,)))
        outputs: tuple[Tensor, ...] = Joined.apply(x, how, of, dropped, scale, frozen, *matrices)
        return outputs


class Joined(torch.autograd.Function):  # type: ignore[misc]
    """n frozen layers and their adapters over one input; gradients for the adapters and the input alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        how: Callable[..., Tensor],
        of: Sequence[Tensor],
        dropped: Tensor | None,
        scale: float,
        frozen: Sequence[Any],
        *matrices: Tensor,
    ) -> tuple[Tensor, ...]:
        """`matrices` are A (rank, in) and B (out, rank) of each layer in turn; `dropped`, where x is 0 for them.

        `how(*of)` makes x once more in the backward pass: what is kept is `of`.
        """
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        down = torch.cat(matrices[::2]).to(x.dtype)  # (layers * rank, in): one product for all the A
        low = (thinned(flat, dropped) @ down.T) * scale  # (tokens, layers * rank)
        ups = [b.to(x.dtype) for b in matrices[1::2]]
        outputs = []
        for layer, up, part in zip(frozen, ups, low.split([b.shape[1] for b in ups], dim=1), strict=True):
            y = torch.nn.functional.linear(flat, weight(layer, x.dtype), layer.bias)
            outputs.append(y.addmm_(part, up.T).view(*x.shape[:-1], -1))
        ctx.save_for_backward(dropped, low, down, *ups, *of)
        ctx.how, ctx.scale, ctx.frozen, ctx.shape = how, scale, frozen, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The same, the other way."""
        dropped, low, down, *rest = ctx.saved_tensors
        ups, of = rest[: len(ctx.frozen)], rest[len(ctx.frozen) :]
        flat = ctx.how(*of).reshape(low.shape[0], -1)
        gradients = [g.reshape(flat.shape[0], -1) for g in upstream]
        parts = low.split([b.shape[1] for b in ups], dim=1)
        of_ups = [g.T @ part for g, part in zip(gradients, parts, strict=True)]
        of_low = torch.cat([g @ up for g, up in zip(gradients, ups, strict=True)], dim=1) * ctx.scale
        of_downs = (of_low.T @ thinned(flat, dropped)).split([b.shape[1] for b in ups])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_low @ down
            if dropped is not None:
                of_x.view(-1).index_fill_(0, dropped, 0)
            for g, layer in zip(gradients, ctx.frozen, strict=True):
                of_x.addmm_(g, weight(layer, g.dtype))
            of_x = of_x.view(ctx.shape)
        pairs = (grad for pair in zip(of_downs, of_ups, strict=True) for grad in pair)
        return (of_x, None, None, None, None, None, *(grad.float() for grad in pairs))


def made_again_by(how: Callable[..., Tensor], of: Sequence[Tensor], x: Tensor) -> Tensor:
    """The tensor, with a note that `how(*of)` makes it again, bit for bit, from what is kept anyway."""
    setattr(x, AGAIN, (how, [tensor.detach() for tensor in of]))
    return x


def weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """A frozen layer's weight (out, in), unpacked if it is held in 4 bits."""
    state = getattr(layer.weight, "quant_state", None)
    found: Tensor = layer.weight if state is None else dequantize_4bit(layer.weight, state)
    return found.to(dtype)


def thinned(x: Tensor, dropped: Tensor | None) -> Tensor:
    """The input with zeros where it is dropped; the scale makes up for what is missing."""
    return x if dropped is None else x.reshape(-1).index_fill(0, dropped, 0).view(x.shape)


def drawn(count: int, probability: float, device: torch.device) -> Tensor:
    """The places that are dropped, of `count`: each with the given probability.

    Places are drawn, some of them twice: after k draws one is still untouched with probability (1 - 1/count)^k, and k
    is chosen so that this is 1 - `probability`. To draw the few that are dropped costs a tenth of a random number for
    each element, and they take less memory than a mask.
    """
    draws = round(math.log1p(-probability) / math.log1p(-1 / count)) if count > 1 else 0
    return torch.randint(count, (draws,), device=device)
