"""The hot path, first half: frozen layers and their adapters in one forward and one backward.

    y = x Wᵀ + s · drop(x) Aᵀ Bᵀ        for every layer that is given the same x (q, k, v; gate, up)

Written by hand because autograd, over PEFT's modules, keeps x and a dropped copy of it for every layer and walks the
result of a layer five times. Here x is kept once for all layers that share it, W is unpacked when it is needed and
forgotten at once, and one dropout mask serves them all. The weights stay in PEFT's modules: only `forward` is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from torch import Tensor
from torch.nn import Module

ADAPTER = "default"  # PEFT's name for the only adapter


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
                self.given = x
                self.outputs = dict(enumerate(self.compute(x)))
            found = self.outputs.pop(number)
            if not self.outputs:
                self.given = None
            return found

        return forward

    def compute(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every layer's output."""
        probability = getattr(self.dropout, "p", 0.0) if self.dropout.training else 0.0
        kept = kept_by_dropout(x.shape, probability, x.device) if probability else None
        scale = self.layers[0].scaling[ADAPTER] / (1.0 - probability)
        frozen = [layer.base_layer for layer in self.layers]
        matrices = [m for layer in self.layers for m in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)]
        outputs: tuple[Tensor, ...] = Joined.apply(x, kept, scale, frozen, *matrices)
        return outputs


class Joined(torch.autograd.Function):  # type: ignore[misc]
    """n frozen layers and their adapters over one input; gradients for the adapters and the input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor | None, scale: float, frozen: Sequence[Any], *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        """`matrices` are A (rank, in) and B (out, rank) of each layer in turn; `kept` is False where x is dropped."""
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        down = torch.cat(matrices[::2]).to(x.dtype)  # (layers * rank, in): one product for all the A
        low = (masked(flat, kept) @ down.T) * scale  # (tokens, layers * rank)
        ups = [b.to(x.dtype) for b in matrices[1::2]]
        outputs = []
        for layer, up, part in zip(frozen, ups, low.split([b.shape[1] for b in ups], dim=1), strict=True):
            y = torch.nn.functional.linear(flat, weight(layer, x.dtype), layer.bias)
            outputs.append(y.addmm_(part, up.T).view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, kept, low, down, *ups)
        ctx.scale, ctx.frozen, ctx.shape = scale, frozen, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The same, the other way."""
        flat, kept, low, down, *ups = ctx.saved_tensors
        gradients = [g.reshape(flat.shape[0], -1) for g in upstream]
        parts = low.split([b.shape[1] for b in ups], dim=1)
        of_ups = [g.T @ part for g, part in zip(gradients, parts, strict=True)]
        of_low = torch.cat([g @ up for g, up in zip(gradients, ups, strict=True)], dim=1) * ctx.scale
        of_downs = (of_low.T @ masked(flat, kept)).split([b.shape[1] for b in ups])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = masked(of_low @ down, kept)
            for g, layer in zip(gradients, ctx.frozen, strict=True):
                of_x.addmm_(g, weight(layer, g.dtype))
            of_x = of_x.view(ctx.shape)
        pairs = (grad for pair in zip(of_downs, of_ups, strict=True) for grad in pair)
        return (of_x, None, None, None, *(grad.float() for grad in pairs))


def weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """A frozen layer's weight (out, in), unpacked if it is held in 4 bits."""
    # A weight that was fetched from the other processes is a plain tensor; its layer still knows how it is packed.
    state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
    found: Tensor = layer.weight if state is None else dequantize_4bit(layer.weight, state)
    return found.to(dtype)


def masked(x: Tensor, kept: Tensor | None) -> Tensor:
    """The input with zeros where it is dropped; the scale makes up for what is missing."""
    # By way of uint8: torch turns bool into bf16 one element at a time, which took six times as long.
    return x if kept is None else x * kept.view(torch.uint8).to(x.dtype).view(x.shape)


def kept_by_dropout(shape: torch.Size, probability: float, device: torch.device) -> Tensor:
    """False with the given probability (to 1/65536), four draws from each 64 random bits.

    `bernoulli_` takes a random number for each element, which was a sixth of a step on a CPU.
    """
    count = shape.numel()
    words = torch.empty(count // 4 + 1, dtype=torch.int64, device=device).random_(-(2**63), None)
    bound = round(probability * 65536) - 32768
    return (words.view(torch.int16)[:count] >= bound).view(shape)
