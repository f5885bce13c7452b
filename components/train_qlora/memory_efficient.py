"""Replace norms and MLPs by versions that save fewer activations; this is part 3 of the hot path.

A replacement computes the same output as the original module. `patch_norms_and_mlps` checks that on a probe, bit for
bit, and does not patch a module that differs. The outputs are not saved either: the consuming layers recompute them in
the backward pass. Together this saves 30 % of the activations and takes 1 to 2 % more time.

With `train.kernels: liger`, the kernels of `liger` are used where their results differ by rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from components.train_qlora import fused_lora, liger
from qlora_retrain.core import progress


class RMSNormFunction(torch.autograd.Function):  # type: ignore[misc]
    """Compute RMSNorm; save the input in its own precision, where autograd saves an fp32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Normalize x (..., D) over its last dimension; return the output, and one over the root mean square (..., 1).

        RMSNorm is that of Zhang and Sennrich, arXiv 1910.07467, equation 4.
        """
        x_fp32 = x.float()
        inverse_rms = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.mark_non_differentiable(inverse_rms)
        return normalize(x_fp32, weight, inverse_rms), inverse_rms

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradient of x, and of the weight where it is not frozen."""
        x, weight, inverse_rms = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            products = grad_output * (x * inverse_rms).to(weight.dtype)
            grad_weight = products.flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)

        # With u = x * inverse_rms and g the gradient of u: dx = inverse_rms * (g - u * mean(g * u)).
        # In place, since each of these fp32 tensors (..., D) has twice the bytes of x.
        grad_unit, unit = (grad_output * weight).float(), x * inverse_rms
        projection = (grad_unit * unit).mean(-1, keepdim=True)  # (..., 1)
        return grad_unit.sub_(unit.mul_(projection)).mul_(inverse_rms).to(x.dtype), grad_weight, None


class SiluMulFunction(torch.autograd.Function):  # type: ignore[misc]
    """Compute silu(gate) * up; save gate and up, and recompute silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, recompute: Recompute) -> Tensor:
        """Compute elementwise over (..., D); `recompute` is the function that recomputes this output in backward."""
        ctx.save_for_backward(gate, up)
        ctx.recompute = recompute
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of gate and up."""
        gate, up = ctx.saved_tensors
        # The recomputation of the output ran just before and left silu(gate); take it and free it there.
        silu_gate, ctx.recompute.silu_gate = ctx.recompute.silu_gate, None
        silu_gate = silu(gate) if silu_gate is None else silu_gate
        return torch.ops.aten.silu_backward(grad_output * up, gate), silu_gate.mul_(grad_output), None


class Recompute:
    """Recompute silu(gate) * up, and leave silu(gate) to `SiluMulFunction.backward`, which runs next."""

    silu_gate: Tensor | None = None

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Compute elementwise."""
        self.silu_gate = silu(gate)
        return self.silu_gate * up


def normalize(x: Tensor, weight: Tensor, inverse_rms: Tensor) -> Tensor:
    """Return weight * (x * inverse_rms), (..., D); the product in brackets in fp32, rounded as Llama's norm rounds."""
    return weight * (x * inverse_rms).to(weight.dtype)


def patch_norms_and_mlps(model: Any, kernels: str = "torch") -> int:
    """Patch the norms and MLPs whose output stays the same, bit for bit; return how many were patched.

    Args:
        model: A model in evaluation mode; the forward methods of its modules are replaced.
        kernels: `torch`, or `liger`. A liger kernel may differ in the last bits; one that differs more is not used,
            and the log says so.
    """
    num_patched = num_mismatched = 0
    for module in model.modules():
        # These attributes are those of Llama's modules, which most decoders copy. The probe below checks the formula.
        if isinstance(getattr(module, "variance_epsilon", None), float) and hasattr(module, "weight"):
            forward, liger_forward, width = rms_norm_forward, liger.rms_norm_forward, module.weight.shape[0]
        elif all(hasattr(module, f"{name}_proj") for name in ("gate", "up", "down")):
            forward, liger_forward, width = mlp_forward, liger.mlp_forward, module.gate_proj.in_features
        else:
            continue

        probe = torch.linspace(-3, 3, 15 * width, device=model.device, dtype=model.dtype).view(3, 5, width)
        with torch.no_grad():
            expected = module(probe)
            # Checked for liger too: its kernel could be close to a module whose formula is only similar.
            if not torch.equal(expected, forward(module, probe)):
                continue
            if kernels == "liger" and not is_close(expected, liger_forward(module, probe)):
                num_mismatched += 1
            elif kernels == "liger":
                forward = liger_forward
        module.forward = forward.__get__(module)
        num_patched += 1
    if num_mismatched:
        progress.say(
            f"train.kernels: liger's results differ too much for {num_mismatched} of {num_patched} norms and MLPs; "
            "these use torch's operations instead"
        )
    return num_patched


def is_close(expected: Tensor, actual: Tensor) -> bool:
    """Return whether two tensors differ by at most 8 units of rounding of the first one's largest number."""
    tolerance = 8 * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool((expected - actual).abs().max() <= tolerance)


def rms_norm_forward(module: Any, x: Tensor) -> Tensor:
    """Replace the forward method of an RMSNorm module."""
    output, inverse_rms = RMSNormFunction.apply(x, module.weight, module.variance_epsilon)
    return fused_lora.recompute_from(normalize, (x, module.weight, inverse_rms), output)


def mlp_forward(module: Any, x: Tensor) -> Tensor:
    """Replace the forward method of an MLP module: down(silu(gate(x)) * up(x))."""
    sources, recompute = (module.gate_proj(x), module.up_proj(x)), Recompute()
    output: Tensor = module.down_proj(
        fused_lora.recompute_from(recompute, sources, SiluMulFunction.apply(*sources, recompute))
    )
    return output
