# ruff: noqa: N806 (A and B are the adapter's two matrices, as the LoRA paper and PEFT call them)
"""Fuse frozen layers and their adapters into one autograd function; this is part 1 of the hot path.

    y = x Wᵀ + s * dropout(x) Aᵀ Bᵀ        for every layer that gets the same x (q, k, v; gate, up)

Autograd over PEFT's modules keeps x and a copy of it after dropout for every layer, and reads or writes the output of a
layer five times. Here x is kept once for all layers that share it, and dropout draws once for all of them. W is
dequantized when it is needed and freed at once. The weights stay in PEFT's modules; only their `forward` is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Module

from qlora_retrain.lm import base_formats

ADAPTER_NAME = "default"  # PEFT's name for the only adapter
Matrices = tuple[Tensor, Tensor]  # A (rank, in) and B (out, rank)
FrozenLayer = tuple[Any, Callable[[Any], Tensor]]  # and what returns its weight (out, in), unpacked
RECOMPUTE_ATTRIBUTE = (
    "recompute_from"  # set on a tensor: the function and the inputs that recompute it in the backward pass
)


class ForwardMethod(Protocol):
    """What a forward pass asks the method of `train.method`."""

    def scale(self, layer: Any) -> float:
        """Return what B A of a layer is multiplied by at this step."""

    def matrices(self, layer: Any) -> Matrices:
        """Return A and B of a layer at this step."""

    def scale_output(self, layer: Any, output: Tensor) -> Tensor:
        """Return the output of a layer as the method changes it."""


def fuse_lora_layers(model: PeftModel, method: ForwardMethod) -> int:
    """Compute every adapted layer by `FusedLoRAFunction`, together with the layers that share its input.

    Hooks observe in a forward pass of two tokens which layers get the same input tensor.

    Args:
        model: The base with the adapter.
        method: Says what the matrices of a layer are.

    Returns:
        The number of groups.
    """
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    layers_by_input: dict[int, list[Module]] = {}
    inputs: list[Tensor] = []  # kept alive, since Python may reuse the id of a freed object

    def record_input(layer: Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])
        layers_by_input.setdefault(id(args[0]), []).append(layer)

    hooks = [layer.register_forward_pre_hook(record_input) for layer in layers]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()

    for group_layers in layers_by_input.values():
        group = SharedInputGroup(group_layers, method)
        for i, layer in enumerate(group_layers):
            layer.forward = group.make_forward(i)
    return len(layers_by_input)


class SharedInputGroup:
    """Layers with the same input: the first call computes all of them, the other layers take their outputs."""

    def __init__(self, layers: Sequence[Any], method: ForwardMethod) -> None:
        self.layers, self.method = layers, method
        self.frozen = [(layer.base_layer, base_formats.weight_reader(layer.base_layer)) for layer in layers]
        self.dropout: Any = layers[0].lora_dropout[ADAPTER_NAME]
        self.last_input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def make_forward(self, index: int) -> Callable[[Tensor], Tensor]:
        """Return the new forward method of the layer at `index`."""

        def forward(x: Tensor) -> Tensor:
            if index == 0 or x is not self.last_input or index not in self.outputs:
                self.outputs = dict(enumerate(self.compute(x)))
                # Set only after `compute`, since the recomputation of a checkpointed layer may stop inside it.
                self.last_input = x
            output = self.outputs.pop(index)
            if not self.outputs:
                self.last_input = None
            return output

        return forward

    def compute(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of every layer of the group."""
        dropout_p = getattr(self.dropout, "p", 0.0) if self.dropout.training else 0.0
        dropout_index = sample_dropout_indices(x.numel(), dropout_p, x.device) if dropout_p else None

        lora_weights = [matrix for layer in self.layers for matrix in self.method.matrices(layer)]
        # Inverted dropout scales the remaining values up by 1 / (1 - p), here together with alpha / rank.
        scales = [self.method.scale(layer) / (1.0 - dropout_p) for layer in self.layers]
        scale: float | Tensor = scales[0]
        if len(set(scales)) > 1:
            ranks = torch.tensor([len(a) for a in lora_weights[::2]], device=x.device)
            scale = torch.tensor(scales, device=x.device).repeat_interleave(ranks)
        recompute, sources = getattr(x, RECOMPUTE_ATTRIBUTE, (Tensor.detach, (x,)))
        outputs: tuple[Tensor, ...] = FusedLoRAFunction.apply(
            x, recompute, sources, dropout_index, scale, self.frozen, *lora_weights
        )
        return tuple(self.method.scale_output(layer, y) for layer, y in zip(self.layers, outputs, strict=True))


class FusedLoRAFunction(torch.autograd.Function):  # type: ignore[misc]
    """Compute n frozen layers and their adapters over one input, with gradients for the adapters and the input.

    The letters in shapes: N tokens, I input width, O output width of a layer, r rank, n layers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        recompute: Callable[..., Tensor],
        sources: Sequence[Tensor],
        dropout_index: Tensor | None,
        scale: float | Tensor,
        frozen: Sequence[FrozenLayer],
        *lora_weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the output of each layer, (..., O).

        Args:
            ctx: Autograd's context.
            x: (..., I).
            recompute: `recompute(*sources)` returns x again in the backward pass.
            sources: The tensors that are saved instead of x.
            dropout_index: The positions of the flattened x that the adapters see as 0; None without dropout.
            scale: alpha / rank, times 1 / (1 - p) with dropout; (n * r,) in fp32 where layers have their own.
            frozen: The frozen layers.
            lora_weights: A (r, I) and B (O, r) of each layer in turn.
        """
        x_flat = x.reshape(-1, x.shape[-1])  # (N, I)
        stacked_A = torch.cat(lora_weights[::2]).to(x.dtype)  # (n * r, I), so that all A take one product
        low_rank = ((apply_dropout(x_flat, dropout_index) @ stacked_A.T) * scale).to(x.dtype)  # (N, n * r)
        all_B = [B.to(x.dtype) for B in lora_weights[1::2]]  # n of (O, r)

        # In place: an out-of-place sum would need a third (N, O) tensor.
        outputs = []
        for (layer, weight), B, low_rank_part in zip(
            frozen, all_B, low_rank.split([B.shape[1] for B in all_B], dim=1), strict=True
        ):
            y = torch.nn.functional.linear(x_flat, weight(layer).to(x.dtype), layer.bias)  # (N, O)
            y.addmm_(low_rank_part, B.T)
            # Not `view`: autograd refuses a change of a view in place, and some models scale these outputs in place.
            outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])))

        ctx.save_for_backward(dropout_index, low_rank, stacked_A, *all_B, *sources)
        ctx.recompute, ctx.scale, ctx.frozen, ctx.shape = recompute, scale, frozen, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x (..., I), and of each A (r, I) and B (O, r)."""
        dropout_index, low_rank, stacked_A, *tensors = ctx.saved_tensors
        all_B, sources = tensors[: len(ctx.frozen)], tensors[len(ctx.frozen) :]
        x_flat = ctx.recompute(*sources).reshape(low_rank.shape[0], -1)  # (N, I)
        grads = [grad.reshape(x_flat.shape[0], -1) for grad in grad_outputs]  # n of (N, O)

        low_rank_parts = low_rank.split([B.shape[1] for B in all_B], dim=1)
        grad_B = [grad.T @ low_rank_part for grad, low_rank_part in zip(grads, low_rank_parts, strict=True)]
        grad_low_rank = torch.cat([grad @ B for grad, B in zip(grads, all_B, strict=True)], dim=1)  # (N, n * r)
        grad_low_rank = (grad_low_rank * ctx.scale).to(x_flat.dtype)
        grad_A = (grad_low_rank.T @ apply_dropout(x_flat, dropout_index)).split([B.shape[1] for B in all_B])

        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low_rank @ stacked_A  # (N, I)
            if dropout_index is not None:
                # Dropout applies only to the adapters: mask the gradient before that of the frozen layers is added.
                grad_x.view(-1).index_fill_(0, dropout_index, 0)
            for grad, (layer, weight) in zip(grads, ctx.frozen, strict=True):
                grad_x.addmm_(grad, weight(layer).to(grad.dtype))
            grad_x = grad_x.view(ctx.shape)

        # In the order of forward's arguments, A and B of each layer in turn; in fp32, as the adapter's weights are.
        grad_lora = (grad for pair in zip(grad_A, grad_B, strict=True) for grad in pair)
        return (grad_x, None, None, None, None, None, *(grad.float() for grad in grad_lora))


def recompute_from(recompute: Callable[..., Tensor], sources: Sequence[Tensor], x: Tensor) -> Tensor:
    """Mark x as equal, bit for bit, to `recompute(*sources)`; consuming layers then save the sources and not x."""
    setattr(x, RECOMPUTE_ATTRIBUTE, (recompute, [tensor.detach() for tensor in sources]))
    return x


def apply_dropout(x: Tensor, dropout_index: Tensor | None) -> Tensor:
    """Return x with zeros at `dropout_index`; `SharedInputGroup.compute` puts 1 / (1 - p) into the scale."""
    return x if dropout_index is None else x.reshape(-1).index_fill(0, dropout_index, 0).view(x.shape)


def sample_dropout_indices(count: int, probability: float, device: torch.device) -> Tensor:
    """Draw the positions, of `count`, that dropout sets to 0; each has the given probability.

    Positions are drawn with replacement. After k draws, a position is untouched with probability (1 - 1/count)^k, and k
    is chosen so that this is 1 - `probability`. Drawing only the dropped positions takes a tenth of the time of
    a random number for each element, and the indices take less memory than a mask.
    """
    num_draws = round(math.log1p(-probability) / math.log1p(-1 / count)) if count > 1 else 0
    return torch.randint(count, (num_draws,), device=device)
