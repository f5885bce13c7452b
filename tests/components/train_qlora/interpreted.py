"""Compare loss and gradients of torch's operations with liger-kernel's, which Triton's interpreter runs on a CPU.

It is a program of its own because Triton reads its environment while it is imported: `interpreted.py BASE_NF4`.
Prints a JSON line without and one with gradient checkpointing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter

from components.train_qlora import adapter, packing
from components.train_qlora.data import PaddingCollator
from components.train_qlora.loss import summed_loss
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import loading

implicit_cvt = interpreter._implicit_cvt


def fp32_scalar(argument: Any) -> Any:
    """Convert a kernel's argument: a compiled kernel gets fp32 scalars, the interpreter leaves Python's floats."""
    if isinstance(argument, float):
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
    return implicit_cvt(argument)


def rsqrt(x: Any) -> Any:
    """Triton's own, which the interpreter can run; Liger takes CUDA's, which it cannot."""
    return tl.rsqrt(x)


interpreter._implicit_cvt = fp32_scalar
rms_norm.rsqrt = rsqrt


def loss_and_gradients(
    base_nf4: Path, kernels: str, checkpointing: int | None
) -> tuple[float, dict[str, torch.Tensor], int]:
    """Return the loss of four rows, the gradients of the adapter, and how many Triton kernels ran."""
    torch.manual_seed(0)
    config = TrainConfig(
        rank=4, alpha=12, dropout=0.0, device="cpu", kernels=kernels, gradient_checkpointing=checkpointing
    )
    model = adapter.attach_new(loading.load_nf4(base_nf4), config).train()
    # A new adapter has B = 0, and with it no gradient of A.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    rows = [{"input_ids": list(range(5 + i, 25 + 2 * i)), "labels": list(range(5 + i, 25 + 2 * i))} for i in range(4)]
    with torch.no_grad():
        summed_loss(model, PaddingCollator(0)(rows))  # probes for plain logits by a forward pass of its own

    num_runs = 0
    run_kernel = interpreter.GridExecutor.__call__

    def run_and_count(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_runs
        num_runs += 1
        return run_kernel(*args, **kwargs)

    interpreter.GridExecutor.__call__ = run_and_count
    with packing.packed_attention(model):  # backward recomputes checkpointed layers, so it is inside too
        loss = summed_loss(model, PaddingCollator(0)(rows))
        loss.backward()
    interpreter.GridExecutor.__call__ = run_kernel
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, num_runs


if __name__ == "__main__":
    # Gradients are compared relative to the largest of their matrix.
    for checkpointing in (None, 1):
        (torch_loss, torch_grads, torch_runs), (liger_loss, liger_grads, liger_runs) = (
            loss_and_gradients(Path(sys.argv[1]), kernels, checkpointing) for kernels in ("torch", "liger")
        )
        max_difference = max(
            float((torch_grads[n] - liger_grads[n]).abs().max() / torch_grads[n].abs().max()) for n in torch_grads
        )
        print(
            json.dumps(
                {
                    "losses": [torch_loss, liger_loss],
                    "max_relative_difference": max_difference,
                    "num_gradients": len(torch_grads),
                    "kernel_runs": [torch_runs, liger_runs],
                }
            )
        )
