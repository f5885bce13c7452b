"""FSDP for the frozen base: each process keeps a part of every layer and fetches the rest when the layer is computed.

The adapter is left out: it is small, DDP adds up its gradients, and so optimizer, clipping and checkpoints are the same
with and without. What the other processes hold is fetched a decoder layer at a time, forwards and again backwards, and
dropped at once. Embeddings, the output layer and the tables that belong to 4-bit weights are whole in every process.
"""

from __future__ import annotations

from typing import Any

from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from components.train_qlora import ranks
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError


def shard(model: PeftModel, device: str) -> None:
    """Leave each process its part of the base's decoder layers.

    4-bit weights are sharded as the bytes that they are: FSDP2 fetches tensors of several types together, so the base
    need not be stored as bf16 (`bnb_4bit_quant_storage`), as FSDP1 had it.

    Raises:
        UsageError: If the model does not say what its layers are.
    """
    base: Any = model.get_base_model()
    names = getattr(base, "_no_split_modules", None) or ()
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise UsageError(f"train.parallel: fsdp: {type(base).__name__} does not say what its layers are; use ddp")
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.quant_state = module.weight.quant_state  # the weight itself becomes a plain tensor
    mesh = init_device_mesh(device, (ranks.count(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    frozen = {parameter for layer in layers for parameter in layer.parameters()} - trained
    before = sum(parameter.nbytes for parameter in frozen)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(
        base, mesh=mesh, ignored_params=set(model.parameters())
    )  # has nothing of its own: it lets the layers fetch ahead
    here = sum(p.to_local().nbytes for layer in layers for p in layer.parameters() if isinstance(p, DTensor))
    progress.say(f"fsdp: {len(layers)} layers of {before} bytes, of which this process holds {here}")
