"""Prompt tuning: a few learnt embeddings stand before every row (Lester et al., arXiv 2104.08691).

The learnt embeddings are tokens beyond the vocabulary: token V + i has the i-th of them. So a row with a prompt is a
row with more tokens in front, and packing, caches, ranking of labels and generation need no case for it. PEFT puts the
same embeddings before those of the row; the numbers are equal, and so are the files.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import own_adapter
from qlora_retrain.lm.own_adapter import OwnAdapter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NAME = "prompt_embeddings"  # PEFT's, of the tensor in the file
_PARAMETER = "virtual_tokens"


def attach(model: PreTrainedModel, config: dict[str, Any]) -> OwnAdapter:
    """Give a model the embeddings of virtual tokens: zeros, in fp32; the other weights are frozen.

    Args:
        model: The base; its embedding layer's forward method is replaced.
        config: PEFT's adapter_config.json: `num_virtual_tokens` and `token_dim`.

    Raises:
        UsageError: If the prompt is for embeddings of another width, or the family reads tokens in other places too.
    """
    import torch

    model.requires_grad_(False)
    embedding: Any = model.get_input_embeddings()
    vocab_size, width = embedding.weight.shape
    count = int(config["num_virtual_tokens"])
    if int(config["token_dim"]) != width:
        raise UsageError(
            f"adapter: its virtual tokens have {config['token_dim']} numbers, and embeddings of {type(model).__name__} "
            f"have {width}; it was trained over another base"
        )
    parameter = torch.nn.Parameter(torch.zeros(count, width, device=embedding.weight.device))
    embedding.register_parameter(_PARAMETER, parameter)
    embed = embedding.forward

    def forward(self: Any, ids: Tensor) -> Tensor:
        rows = embed(ids.clamp(max=vocab_size - 1))  # (B, T, D)
        virtual = self.virtual_tokens.to(rows.dtype)[(ids - vocab_size).clamp(min=0)]
        return torch.where((ids >= vocab_size).unsqueeze(-1), virtual, rows)

    embedding.forward = MethodType(forward, embedding)
    adapter = OwnAdapter(config, {NAME: parameter})
    own_adapter.put(model, adapter)
    _probe(model)
    return adapter


def detach(model: PreTrainedModel) -> None:
    """Remove the virtual tokens from a model."""
    embedding: Any = model.get_input_embeddings()
    delattr(embedding, _PARAMETER)
    del embedding.forward
    own_adapter.drop(model)


def prefix_ids(model: Any) -> list[int]:
    """Return the tokens that every row of this model begins with: none without a prompt, or where it is off."""
    adapter = own_adapter.find(model)
    if adapter is None or NAME not in adapter.parameters or not adapter.is_on:
        return []
    first = len(model.get_input_embeddings().weight)
    return list(range(first, first + len(adapter.parameters[NAME])))


def _probe(model: Any) -> None:
    """Refuse a family that looks tokens up in a table of its own beside the embeddings."""
    import torch

    ids = torch.tensor([[*prefix_ids(model), 0]], device=model.device)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except IndexError as error:
        own_adapter.drop(model)
        raise UsageError(
            f"train.method: prompt: {type(model).__name__} looks up its tokens in more than one table, where a virtual "
            "token has no entry; set train.method: prefix, or choose another base"
        ) from error
