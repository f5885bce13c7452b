"""Loss and gradients with torch's operations and with liger-kernel's, which Triton's interpreter runs on a CPU.

A process of its own, since Triton reads its environment while it is imported: `interpreted.py BASE_NF4`.
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

from components.train_qlora import lora, packed
from components.train_qlora.loss import summed_loss
from components.train_qlora.rows import Collate
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import loading

given = interpreter._implicit_cvt


def scalar(argument: Any) -> Any:
    """What a kernel is given; a compiled one is given fp32 scalars, the interpreter leaves Python's."""
    if isinstance(argument, float):
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
    return given(argument)


def rsqrt(x: Any) -> Any:
    """Triton's own, looked up when it is interpreted; Liger takes CUDA's, which cannot be."""
    return tl.rsqrt(x)


interpreter._implicit_cvt = scalar
rms_norm.rsqrt = rsqrt


def computed(base_nf4: Path, kernels: str, checkpointing: int | None) -> tuple[float, dict[str, torch.Tensor], int]:
    """The loss of four rows, the gradients of the adapter, and how many Triton kernels ran."""
    torch.manual_seed(0)
    config = TrainConfig(
        rank=4, alpha=12, dropout=0.0, device="cpu", kernels=kernels, gradient_checkpointing=checkpointing
    )
    model = lora.attach_new(loading.load_nf4(base_nf4), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    rows = [{"input_ids": list(range(5 + i, 25 + 2 * i)), "labels": list(range(5 + i, 25 + 2 * i))} for i in range(4)]
    with torch.no_grad():
        summed_loss(model, Collate(0)(rows))  # finds out what follows the output layer, by a pass of its own
    ran = 0
    plain = interpreter.GridExecutor.__call__

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        ran += 1
        return plain(*args, **kwargs)

    interpreter.GridExecutor.__call__ = counting
    with packed.attention_by_rows(model):  # a layer that is computed twice is so in the backward pass
        loss = summed_loss(model, Collate(0)(rows))
        loss.backward()
    interpreter.GridExecutor.__call__ = plain
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, ran


if __name__ == "__main__":
    for checkpointing in (None, 1):
        (one, ours, none), (other, ligers, ran) = (
            computed(Path(sys.argv[1]), kernels, checkpointing) for kernels in ("torch", "liger")
        )
        furthest = max(float((ours[n] - ligers[n]).abs().max() / ours[n].abs().max()) for n in ours)
        print(json.dumps({"losses": [one, other], "furthest": furthest, "gradients": len(ours), "ran": [none, ran]}))
