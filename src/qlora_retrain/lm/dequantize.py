"""Unpack a packed model to fp32, with one layer in memory in both forms at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_retrain.lm import memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_retrain.lm.base_formats.base_format import BaseFormat


def dequantize(model: PreTrainedModel, base_format: BaseFormat) -> PreTrainedModel:
    """Replace every packed layer by a plain one in fp32, in place; return the model in evaluation mode.

    transformers' own `dequantize` unpacks each layer twice, and keeps all packed layers until its end.
    """
    import torch

    # First what was not packed, such as embeddings: the largest tensor is then in memory twice before all others are.
    # Without the setting transformers lets the model change its type; the packed weights are whole numbers and stay.
    model.hf_quantizer.remove_quantization_config(model)
    model.float()

    # By name, since a list of the modules would keep the packed ones alive.
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = [name for name, module in linear if base_format.is_packed_layer(module)]
    del linear
    for name in names:
        packed = model.get_submodule(name)
        with torch.device("meta"):  # the numbers that a new layer begins with are not needed
            plain = torch.nn.Linear(packed.in_features, packed.out_features, bias=False)
        weight = base_format.layer_weight(packed).float()
        plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), packed.bias
        model.set_submodule(name, plain)
        del packed, plain, weight

    memory.release_dropped_models()  # the packed weights, and the map of their file
    return model.eval()
