"""Prepare micro-batches in host memory, and copy them to the model's device without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from components.train_qlora import packing
from components.train_qlora.data import IGNORE_INDEX, Batch
from qlora_retrain.lm import virtual_tokens

Tensors = TypeVar("Tensors")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What a forward pass over some rows takes, on the model's device.

    Attributes:
        num_rows: B
        inputs: the arguments of the model's forward method, over B * seq padded or T packed positions
        label_positions: (N,), which of these positions predict a label
        labels: (N,), the labels
    """

    num_rows: int
    inputs: dict[str, Any]
    label_positions: Tensor
    labels: Tensor


def prepare(model: Any, batch: Batch | MicroBatch, dtype: torch.dtype | None = None) -> MicroBatch:
    """Lay out the rows of a batch for a forward pass, in host memory, and copy them to the model's device.

    The copy does not wait for the GPU, and nothing afterwards must ask it how many tokens there are.
    A micro-batch that is prepared is returned as it is. Attention computes in `dtype`; None: in that of the weights.
    """
    if isinstance(batch, MicroBatch):
        return batch
    batch = with_virtual_tokens(batch, virtual_tokens.prefix_ids(model))
    if packing.can_pack(model):
        packed = packing.pack(batch, dtype or model.dtype, packing.backend(model))
        labels = packed.labels.flatten()
        packed = to_device(replace(packed, layout=to_device(packed.layout, model.device)), model.device)
        inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "packed_batch": packed}
    else:
        labels = pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        inputs = {name: upload(batch[name], model.device) for name in ("input_ids", "attention_mask")}

    # On a GPU the number of labels would have to be waited for.
    positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    return to_device(MicroBatch(len(batch["input_ids"]), inputs, positions, labels[positions]), model.device)


def with_virtual_tokens(batch: Batch, prefix_ids: list[int]) -> Batch:
    """Return the batch with these tokens before each row; nothing is learnt at them."""
    if not prefix_ids:
        return batch
    prefix = torch.tensor([prefix_ids]).expand(len(batch["input_ids"]), -1)  # (B, virtual)
    values = {"input_ids": prefix, "labels": torch.full_like(prefix, IGNORE_INDEX)}
    values["attention_mask"] = torch.ones_like(prefix, dtype=batch["attention_mask"].dtype)
    return {**batch, **{name: torch.cat([values[name], batch[name]], dim=1) for name in values}}


def to_device(batch: Tensors, device: torch.device) -> Tensors:
    """Copy a dataclass with the tensors that it has to a device."""
    copies = {}
    for field in fields(batch):  # type: ignore[arg-type]
        if isinstance(value := getattr(batch, field.name), Tensor):
            copies[field.name] = upload(value, device)
    return replace(batch, **copies)  # type: ignore[type-var]


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting for a GPU."""
    # Only from pinned memory does a copy run beside the computation. torch reuses that memory after the copy.
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
