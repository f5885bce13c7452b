"""Count intruder dimensions: strong directions of a fine-tuned layer that the base layer did not have.

The definition is that of Shuttleworth, Andreas, Torralba and Sharma 2024, "LoRA vs full fine-tuning: an illusion of
equivalence" (arXiv 2410.21228). An intruder is a singular vector of W + BA whose largest absolute cosine similarity to
any singular vector of W is below epsilon.

As in the paper (and in PEFT's `reduce_intruder_dimension`), left singular vectors are compared, and only the `top_k`
strongest of W + BA. W is what the challenger computes with: the values of the packed weights. With DoRA the rows of
W + BA have their trained lengths. Where all weights trained, their trained values stand for W + BA.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.core import progress
from qlora_retrain.lm import base_formats
from qlora_retrain.lm.weight_files import SafetensorsFolder
from qlora_retrain.lm.weight_names import names_in_model

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


# The number of the base's vectors that are computed first, as a multiple of `top_k`.
_BASE_VECTORS_FACTOR = 2
# Relative to the largest squared singular value. Below it, rounding dominates a vector of the Gram matrix.
_MIN_RELATIVE_SQUARE = 1e-10
_FP64_ROWS = 1024  # rows of a matrix in fp64 at a time


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

    layers: list[LayerIntruders] = []
    if not top_k:
        return layers
    # The matrices are counted first, so that the progress bar has a total.
    is_adapted = any(True for _ in _lora_layers(model))
    total = sum(1 for _ in (_lora_layers(model) if is_adapted else _linear_layers(model)))
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
    for name, module in _lora_layers(model):
        base = base_formats.layer_weight(module.get_base_layer()).float()
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


def max_similarities(base: torch.Tensor, tuned: torch.Tensor, top_k: int) -> torch.Tensor:
    """Compare each of the `top_k` strongest left singular vectors of `tuned` with all of `base`'s.

    The base's vectors are orthonormal, so the squares of a direction's cosines to all of them sum to at most 1. If
    the strongest ones leave less of that sum than the square of the largest cosine, no other vector can be nearer.
    Then the others are never computed. This is the case for almost every matrix without intruders.

    Returns:
        The largest absolute cosine of each vector: (top_k,).
    """
    tuned_vectors = _top_left_singular_vectors(tuned, top_k)  # (out, top_k)
    base_vectors = _top_left_singular_vectors(base, _BASE_VECTORS_FACTOR * top_k)  # (out, 2 * top_k)
    cosines = tuned_vectors.T @ base_vectors  # (top_k, 2 * top_k)
    largest = cosines.abs().amax(dim=1)

    # The squared cosines to all other vectors of the base sum to at most this: (top_k,).
    remaining_square = 1 - cosines.square().sum(dim=1)
    if base_vectors.shape[1] < min(base.shape) and bool((largest.square() < remaining_square).any()):
        all_base_vectors = _top_left_singular_vectors(base, min(base.shape))
        largest = (tuned_vectors.T @ all_base_vectors).abs().amax(dim=1)
    return largest


def _top_left_singular_vectors(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Compute the left singular vectors (out, count) of the largest singular values, the largest first, in fp64.

    On a CPU they are eigenvectors of the smaller of M M^T and M^T M in fp64, which can be computed without the other
    vectors. This squares the condition number and so loses half of fp64's 16 digits. The rest is still more accurate
    than an SVD in fp32. Where it is not enough, the SVD is computed.
    """
    import torch
    from scipy.linalg import eigh

    count = min(count, *matrix.shape)
    if count < min(matrix.shape) and not matrix.is_cuda:
        is_wide = matrix.shape[0] <= matrix.shape[1]
        # Rows that are as long as the Gram matrix is wide, so that it is a sum over parts of them.
        rows = (matrix.T if is_wide else matrix).split(_FP64_ROWS)
        gram = torch.zeros(rows[0].shape[1], rows[0].shape[1], dtype=torch.float64)
        for part in rows:
            values = part.double()
            gram.addmm_(values.T, values)
        # eigh sorts in ascending order, so the largest are the last.
        first = len(gram) - count
        # Transposed it is in LAPACK's order, so no copy is made.
        subset = [first, len(gram) - 1]
        squares, vectors = eigh(gram.numpy().T, subset_by_index=subset, driver="evr", overwrite_a=True)
        if squares[0] > _MIN_RELATIVE_SQUARE * squares[-1]:
            largest = torch.from_numpy(vectors[:, ::-1].copy())
            if is_wide:
                return largest
            # M^T M has the right singular vectors v; the left ones are M v / s.
            left = torch.cat([part.double() @ largest for part in rows])
            return left / torch.from_numpy(squares[::-1].copy()).sqrt()
    left_vectors, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left_vectors[:, :count].double()


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


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    # A layer without lora_A, such as an adapted embedding, has no W + BA of this form.
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and len(m.lora_A))
