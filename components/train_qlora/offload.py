"""Keep the inputs of checkpointed layers in pinned host memory between the forward and the backward pass.

A checkpointed layer keeps its input alone, (B, seq, D). With long rows these inputs are most of a GPU's activations.
They go to the host while the layer computes, and each comes back while the layer behind it is recomputed: all copies
run on a stream of their own. On a CPU there is nothing to move.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MIN_BYTES = 2**20  # a smaller copy costs more than it frees


class HostCopy:
    """A copy of a tensor in host memory.

    Attributes:
        host: The copy.
        device: Where the tensor was.
        previous: The copy that was made before, which the backward pass needs next; a dead reference where none is.
    """

    def __init__(self, x: Tensor, stream: Any, previous: Callable[[], HostCopy | None]) -> None:
        self.device, self.stream, self.previous = x.device, stream, previous
        self.fetched: tuple[Tensor, Any] | None = None
        # Strides are kept, so that a recomputed layer gets what it got in the forward pass.
        self.host = torch.empty_like(x, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(x)
            return
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.host.copy_(x, non_blocking=True)
        # The memory of x must not be used again before the copy has run.
        x.record_stream(stream)

    def fetch(self) -> None:
        """Begin to copy the tensor back, if that has not begun."""
        if self.fetched is not None:
            return
        if self.stream is None:
            self.fetched = self.host.clone(), None
            return
        with torch.cuda.stream(self.stream):
            # In the order of the stream, and so after the copy to the host.
            self.fetched = self.host.to(self.device, non_blocking=True), self.stream.record_event()

    def take(self) -> Tensor:
        """Return the tensor on its device, and begin to copy back the one that is needed next."""
        self.fetch()
        assert self.fetched is not None
        tensor, event = self.fetched
        # Taken once: the tensor is freed with the layer that it is for.
        self.fetched = None
        if event is not None:
            compute_stream = torch.cuda.current_stream(self.device)
            compute_stream.wait_event(event)
            tensor.record_stream(compute_stream)
        if (previous := self.previous()) is not None:
            previous.fetch()
        return tensor


class InputOffload:
    """Copy the inputs of the layers that are checkpointed through it to the host, in the order of the forward pass.

    Attributes:
        stream: The stream of the copies; None: they are made at once, as on a CPU.
        min_bytes: Smaller tensors stay where they are.
        num_copies: How many were made.
    """

    def __init__(self, stream: Any, min_bytes: int = MIN_BYTES) -> None:
        self.stream, self.min_bytes, self.num_copies = stream, min_bytes, 0
        self.last: Callable[[], HostCopy | None] = lambda: None

    def wrap(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Return torch's `checkpoint(function, *inputs)` with the inputs that it keeps in host memory."""

        def offloaded_checkpoint(function: Callable[..., Any], *inputs: Any) -> Any:
            # torch pushes hooks of its own for what `function` saves, so these get the inputs alone.
            with saved_tensors_hooks(self._pack, self._unpack):
                return checkpoint(function, *inputs)

        return offloaded_checkpoint

    def _pack(self, x: Tensor) -> Tensor | HostCopy:
        if x.nbytes < self.min_bytes:
            return x
        copy = HostCopy(x, self.stream, self.last)
        # Autograd holds the copies; one whose backward pass has run, or never will, is freed.
        self.last = weakref.ref(copy)
        self.num_copies += 1
        return copy

    @staticmethod
    def _unpack(packed: Tensor | HostCopy) -> Tensor:
        return packed.take() if isinstance(packed, HostCopy) else packed


def offload_layer_inputs(model: Any, offload: InputOffload) -> int:
    """Let the checkpointed layers keep their inputs in host memory; return the number of layers."""
    layers = [module for module in model.modules() if "_gradient_checkpointing_func" in vars(module)]
    for layer in layers:
        layer._gradient_checkpointing_func = offload.wrap(layer._gradient_checkpointing_func)
    return len(layers)
