"""Norms and gates by liger-kernel's Triton kernels, one each forwards and backwards: `train.kernels: liger`, on a GPU.

They take the place of what `lean` does in torch operations; what they give is made again in the same way. Liger's loss
is not used: `loss` computes as few logits as it does, and only where there is a label.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from components.train_qlora import joined

INSTALLED = find_spec("liger_kernel") is not None


def norm(module: Any, x: Tensor) -> Tensor:
    """RMSNorm with a frozen weight, over the last dimension."""
    from liger_kernel.ops import LigerRMSNormFunction

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        # 0.0 is added to the weight; rounded where Llama's norm rounds; a gradient is not written over another.
        found: Tensor = LigerRMSNormFunction.apply(x, weight, module.variance_epsilon, 0.0, "llama", False)
        return found

    of = (x, module.weight)
    return joined.made_again_by(normed, of, normed(*of))


def mlp(module: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)).

    The kernel writes its gradients over gate and up. By then nothing needs them: `down` was the last, and went first.
    """
    from liger_kernel.ops import LigerSiLUMulFunction

    of = (module.gate_proj(x), module.up_proj(x))
    found: Tensor = module.down_proj(
        joined.made_again_by(LigerSiLUMulFunction.apply, of, LigerSiLUMulFunction.apply(*of))
    )
    return found
