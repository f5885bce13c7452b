"""Find out what a model does with the outputs of its output layer, and do that to a chunk of them.

Some models scale or cap these outputs (Gemma 2, Cohere, Granite, Falcon-H1). Config files have many names for that. So
a probe finds it out, and the model's own code is run for it, with a decoder and an output layer that compute nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

# plain: the output layer's outputs; transformed: what `after_head` makes of them; other: only the whole model has them
LogitsKind = Literal["plain", "transformed", "other"]
LOGITS_KINDS = WeakKeyDictionary[torch.nn.Module, LogitsKind]()  # by output layer: the results of `logits_kind`


def logits_kind(model: Any) -> LogitsKind:
    """Return how a model's logits follow from its output layer; a forward pass over three tokens finds it out once."""
    lm_head, outputs = model.get_output_embeddings(), list[Tensor]()
    if lm_head not in LOGITS_KINDS:
        hook = lm_head.register_forward_hook(lambda _, args, output: outputs.append(output))
        try:
            # The probe must not change the draws of dropout.
            with torch.no_grad(), torch.random.fork_rng():
                logits = model(input_ids=torch.tensor([[0, 1, 2]], device=model.device), use_cache=False).logits
        finally:
            hook.remove()
        if torch.equal(logits.float(), outputs[0].float()):
            LOGITS_KINDS[lm_head] = "plain"
        else:
            LOGITS_KINDS[lm_head] = "transformed" if _is_computed_after_head(model, outputs[0], logits) else "other"
    return LOGITS_KINDS[lm_head]


def _is_computed_after_head(model: Any, outputs: Tensor, logits: Tensor) -> bool:
    """Return whether `after_head` gives the same bits, for each position alone too."""
    try:
        with torch.no_grad():
            alone = [after_head(model, position) for position in outputs[0].split(1)]
            together = after_head(model, outputs[0])
        return bool(torch.equal(together, logits[0]) and torch.equal(torch.cat(alone), logits[0]))
    # A family that is built in another way lacks an attribute, or has one more.
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError):
        return False


def after_head(model: Any, outputs: Tensor) -> Tensor:
    """Return the logits (N, V) that the model's own code makes of the outputs (N, V) of its output layer."""
    # Not through DDP or FSDP, whose hooks count forward passes.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    lm_head = base.get_output_embeddings()
    no_hidden = outputs.new_empty(1, 0, lm_head.weight.shape[1])
    hook = lm_head.register_forward_hook(lambda *_: outputs.unsqueeze(0))
    try:
        with _forward_replaced(base.get_decoder(), MoeModelOutputWithPast(last_hidden_state=no_hidden)):
            token = torch.zeros(1, 1, dtype=torch.long, device=outputs.device)
            logits: Tensor = base.forward(input_ids=token, use_cache=False).logits
    finally:
        hook.remove()
    return logits[0]


@contextmanager
def _forward_replaced(module: Any, result: Any) -> Iterator[None]:
    """Make the module return `result` for any input, inside the context."""
    own_forward = module.__dict__.get("forward")  # where a method was replaced on this module alone
    module.forward = lambda *_, **__: result
    try:
        yield
    finally:
        del module.forward
        if own_forward is not None:
            module.forward = own_forward
