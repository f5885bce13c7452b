"""Shard the frozen base with FSDP: each process keeps a shard of every layer and gathers the others to compute it.

The adapter is not sharded: it is small, and DDP sums its gradients. So optimizer, clipping and checkpoints are the same
with and without FSDP. One decoder layer at a time is gathered, in forward and again in backward, and freed at once.
Embeddings, the output layer and what packed weights have beside their codes are whole in every process.
"""

from __future__ import annotations

from typing import Any

from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from components.train_qlora.processes import distributed
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError


def shard(model: PeftModel, device: str) -> None:
    """Shard the base's decoder layers, so that this process keeps only its part.

    4-bit weights are sharded as bytes, because FSDP2 can gather tensors of several types together. FSDP1 required them
    to be stored as bf16 (`bnb_4bit_quant_storage`).

    Raises:
        UsageError: If the model does not name its decoder layers.
    """
    base: Any = model.get_base_model()
    class_names = getattr(base, "_no_split_modules", None) or ()
    layers = [module for module in base.modules() if type(module).__name__ in class_names]
    if not layers:
        raise UsageError(
            f"train.parallel: fsdp needs a model that names its decoder layers (`_no_split_modules`), and "
            f"{type(base).__name__} does not; use ddp"
        )

    # Sharding replaces the weight by a plain tensor, so the layer keeps its quantization state; `fused_lora` reads it.
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.quant_state = module.weight.quant_state

    mesh = init_device_mesh(device, (distributed.world_size(),))
    # Some methods have frozen matrices, too.
    adapter = {parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    frozen = {parameter for layer in layers for parameter in layer.parameters()} - adapter
    total_bytes = sum(parameter.nbytes for parameter in frozen)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapter)
    # The root has no parameters of its own to shard; it lets the layers prefetch the next one.
    fully_shard(base, mesh=mesh, ignored_params=set(model.parameters()))
    local_bytes = sum(p.to_local().nbytes for layer in layers for p in layer.parameters() if isinstance(p, DTensor))
    progress.say(
        f"fsdp: {len(layers)} layers with {total_bytes} bytes in all; this process holds {local_bytes} of them"
    )
