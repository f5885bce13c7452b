"""Count intruder dimensions: strong directions of a fine-tuned layer that the base layer did not have.

The definition is that of Shuttleworth, Andreas, Torralba and Sharma 2024, "LoRA vs full fine-tuning: an illusion of
equivalence" (arXiv 2410.21228). An intruder is a singular vector of W + BA whose largest absolute cosine similarity to
any singular vector of W is below epsilon.

As in the paper (and in PEFT's `reduce_intruder_dimension`), left singular vectors are compared, and only the `top_k`
strongest of W + BA. W is what the challenger computes with: the values of the packed weights. With DoRA the rows of
W + BA have their trained lengths. Where all weights trained, their trained values stand for W + BA; with IA3, the
weights with their scales do. An adapter that changes no weight has no intruders.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.core import progress
from qlora_retrain.lm import base_formats, own_adapter
from qlora_retrain.lm.singular_vectors import max_similarities
from qlora_retrain.lm.weight_files import SafetensorsFolder
from qlora_retrain.lm.weight_names import names_in_model

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class LayerIntruders:
    """The intruder dimensions of one adapted matrix.

    Attributes:
        name: The matrix's path in the model.
        intruders: The number of its strongest directions that are unlike every direction of the base.
        looked_at: The number of directions that were compared.
        least_similarity: The largest cosine of the direction that is least like the base.
    """

    name: str
    intruders: int
    looked_at: int
    least_similarity: float


def count_intruders(
    model: PeftModel | PreTrainedModel, *, top_k: int, epsilon: float, base_nf4: Path | None = None
) -> list[LayerIntruders]:
    """Count the intruder dimensions of every trained linear layer, in the model's order; none with `top_k` 0.

    Args:
        model: The challenger.
        top_k: How many of a layer's directions are looked at.
        epsilon: Below this similarity to all of the base's directions, one is an intruder.
        base_nf4: The base, with whose weights those of a challenger without an adapter are compared.
    """
    import torch
    from peft import PeftModel

    layers: list[LayerIntruders] = []
    if not top_k:
        return layers
    # The matrices are counted first, so that the progress bar has a total.
    is_adapted = isinstance(model, PeftModel) or own_adapter.find(model) is not None
    total = sum(1 for _ in (_adapted_layers(model) if is_adapted else _linear_layers(model)))
    with torch.inference_mode():
        for name, base, tuned in weight_pairs(model) if is_adapted else trained_pairs(model, base_nf4):
            similarities = max_similarities(base, tuned, top_k)
            intruders = int((similarities < epsilon).sum())
            layers.append(LayerIntruders(name, intruders, len(similarities), float(similarities.min())))
            progress.update("intruder dimensions", len(layers), total)
            del base, tuned  # or the next pair would be in memory with this one
    return layers


def weight_pairs(model: PeftModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield each adapted matrix as its path in the model, W and what replaces it; both are (out, in) in fp32."""
    for name, module in _adapted_layers(model):
        base = base_formats.layer_weight(module.get_base_layer()).float()
        if hasattr(module, "ia3_l"):
            tuned = base * module.ia3_l["default"].float()  # (out, 1), or (1, in)
        else:
            tuned = base + module.get_delta_weight("default").float()
        if hasattr(module, "row_scale"):
            tuned.mul_(module.row_scale.view(-1, 1))
        yield name.removeprefix("base_model.model."), base, tuned


def trained_pairs(model: Any, base_nf4: Path | None) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the same of a model all of whose weights trained; W is read from the base's files, one at a time."""
    assert base_nf4 is not None, "without an adapter, the base's weights must be read from its folder"
    layers = list(_linear_layers(model))
    with SafetensorsFolder(base_nf4) as base:
        names = names_in_model(base.names, {f"{name}.weight" for name, _ in layers})
        file_names = {model_name: name for name, model_name in names.items()}
        for name, module in layers:
            original = base.tensor(file_names[f"{name}.weight"]).to(module.weight.device)
            yield name, original.float(), module.weight.float()


def sum_by_block(layers: Sequence[LayerIntruders]) -> dict[str, float]:
    """Sum the intruders over the matrices of each of the model's blocks, for a chart."""
    sums: dict[str, float] = defaultdict(float)
    for layer in layers:
        block = re.search(r"\.(\d+)\.", layer.name)
        sums[f"layer {block[1]}" if block else layer.name] += layer.intruders
    return dict(sums)


def _linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield what adapters would be put on: every linear layer but the output layer."""
    from torch.nn import Linear

    head = model.get_output_embeddings()
    return ((n, m) for n, m in model.named_modules() if isinstance(m, Linear) and m is not head)


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the layers whose weights an adapter changes: those with A and B, or with scales."""
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import LoraLayer

    # A layer without lora_A, such as an adapted embedding, has no W + BA of this form.
    for name, module in model.named_modules():
        if (isinstance(module, LoraLayer) and len(module.lora_A)) or isinstance(module, IA3Layer):
            yield name, module
