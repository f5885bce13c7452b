"""Bottleneck adapters: a small network behind the MLP of each decoder layer (Houlsby et al., arXiv 1902.00751).

    y + U relu(D y)         y is the MLP's output, D (rank, width) and U (width, rank); U starts at zero

One network a layer, behind the MLP alone, as Pfeiffer et al. (arXiv 2005.00247) found to be enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import own_adapter
from qlora_retrain.lm.adapter_kind import BOTTLENECK
from qlora_retrain.lm.own_adapter import OwnAdapter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Names that families give to the MLP of a decoder layer.
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
DOWN, UP = "bottleneck_down", "bottleneck_up"
_HOOK = "bottleneck_hook"


def attach(model: PreTrainedModel, rank: int, dropout: float = 0.0) -> OwnAdapter:
    """Give a model new networks, in fp32, which change no output yet; the other weights are frozen.

    Args:
        model: The base.
        rank: The width of the networks.
        dropout: On the input of each, in training.

    Raises:
        UsageError: If the family has no module that is the MLP of a layer.
    """
    import torch
    from torch.nn import Parameter, init
    from torch.nn.functional import dropout as drop
    from torch.nn.functional import linear, relu

    model.requires_grad_(False)
    adapter = OwnAdapter({"peft_type": BOTTLENECK, "rank": rank})

    def add(module: Any, _: Any, output: Any) -> Any:
        if not adapter.is_on:
            return output
        # A mixture of experts returns the scores of its router, too.
        first: Tensor = output[0] if isinstance(output, tuple) else output
        down, up = (getattr(module, name).to(first.dtype) for name in (DOWN, UP))
        inner = relu(linear(drop(first, dropout, module.training), down))
        changed = first + linear(inner, up)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    width = model.get_input_embeddings().weight.shape[1]
    for path, module in _mlps(model):
        device = next(module.parameters()).device
        down = Parameter(torch.empty(rank, width, device=device))
        init.kaiming_uniform_(down, a=5**0.5)  # as PEFT starts the A of LoRA
        for name, parameter in ((DOWN, down), (UP, Parameter(torch.zeros(width, rank, device=device)))):
            module.register_parameter(name, parameter)
            adapter.parameters[f"{path}.{name}"] = parameter
        setattr(module, _HOOK, module.register_forward_hook(add))
    own_adapter.put(model, adapter)
    return adapter


def detach(model: PreTrainedModel) -> None:
    """Remove the networks from a model."""
    for _, module in _mlps(model):
        getattr(module, _HOOK).remove()
        for name in (DOWN, UP, _HOOK):
            delattr(module, name)
    own_adapter.drop(model)


def _mlps(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """Return the MLP of each decoder layer with its path."""
    layer_classes = getattr(model, "_no_split_modules", None) or ()
    layers = [(path, module) for path, module in model.named_modules() if type(module).__name__ in layer_classes]
    mlps = []
    for path, layer in layers:
        children = dict(layer.named_children())
        name = next((name for name in MLP_NAMES if name in children), None)
        if name is None:
            raise UsageError(
                f"train.method: bottleneck goes behind the MLP of each layer, and {path} of {type(model).__name__} has "
                f"{', '.join(children)}, none of which is called {' or '.join(MLP_NAMES)}; set train.method: lora"
            )
        mlps.append((f"{path}.{name}", children[name]))
    if not mlps:
        raise UsageError(
            f"train.method: bottleneck needs a model that names its decoder layers (`_no_split_modules`), and "
            f"{type(model).__name__} does not; set train.method: lora"
        )
    return mlps
