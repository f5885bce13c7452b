"""Compute norms and MLPs by liger-kernel's Triton kernels on a GPU (`train.kernels: liger`).

Forward and backward are one kernel each.

The kernels replace the torch operations of `memory_efficient`, and their outputs are recomputed in the backward pass in
the same way. Liger's loss is not used: `loss` computes as few logits as Liger does, and only where there is a label.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from components.train_qlora import fused_lora

IS_INSTALLED = find_spec("liger_kernel") is not None


def rms_norm_forward(module: Any, x: Tensor) -> Tensor:
    """Replace the forward method of an RMSNorm module whose weight is frozen."""
    from liger_kernel.ops import (
        LigerRMSNormFunction,
    )  # imported here, since it imports Triton, which a machine without a GPU may lack

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        # The last three arguments: 0.0 is added to the weight; "llama" rounds where Llama's norm rounds; False keeps
        # the gradient of x apart from that of the output, which another path of the model may still need.
        output: Tensor = LigerRMSNormFunction.apply(x, weight, module.variance_epsilon, 0.0, "llama", False)
        return output

    sources = (x, module.weight)
    return fused_lora.recompute_from(rms_norm, sources, rms_norm(*sources))


def mlp_forward(module: Any, x: Tensor) -> Tensor:
    """Replace the forward method of an MLP module: down(silu(gate(x)) * up(x))."""
    from liger_kernel.ops import LigerSiLUMulFunction

    # The kernel overwrites gate and up with their gradients. Nothing needs them by then: `down` recomputes its input
    # from them, but it is last in the forward pass and therefore first in the backward pass.
    sources = (module.gate_proj(x), module.up_proj(x))
    output: Tensor = module.down_proj(
        fused_lora.recompute_from(LigerSiLUMulFunction.apply, sources, LigerSiLUMulFunction.apply(*sources))
    )
    return output
