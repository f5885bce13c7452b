"""Compute the start of an adapter of the original weights, while they are read to be quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import vector_norm
from transformers import PreTrainedModel

from components.quantize_model.quantization_stats import is_finite
from qlora_retrain.config.quantize import QuantizeConfig
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import adapter_start
from qlora_retrain.lm.low_rank import top_singular_triplets
from qlora_retrain.lm.target_layers import adapted_paths, target_modules

Quantized = Callable[[Tensor], Tensor]


class StartBuilder:
    """Sees every weight before it is packed, and keeps the matrices of the layers that get an adapter.

    Attributes:
        config: The method, the rank and the layers.
        paths: The layers.
        matrices: A (rank, in) and B (out, rank) by layer.
    """

    def __init__(self, settings: QuantizeConfig) -> None:
        assert settings.adapter_start is not None
        self.config = settings.adapter_start
        self.paths: set[str] = set()
        self.matrices: dict[str, tuple[Tensor, Tensor]] = {}
        self._squares = torch.zeros(3, dtype=torch.float64)  # of |W|, and of the errors without and with the start

    def select(self, model: PreTrainedModel) -> None:
        """Find the layers in a model whose weights are not read yet.

        Raises:
            UsageError: If a layer has fewer singular vectors than there are ranks.
        """
        self.paths = adapted_paths(model, target_modules(model, self.config.target_modules))
        layers = {path: model.get_submodule(path) for path in sorted(self.paths)}
        sizes = {path: int(min(layer.in_features, layer.out_features)) for path, layer in layers.items()}
        narrow = min(sizes, key=lambda path: sizes[path])
        if self.config.rank > sizes[narrow]:
            raise UsageError(
                f"train.rank: {self.config.rank}, and train.method: {self.config.method} begins with as many singular "
                f"vectors of each layer, of which {narrow} has {sizes[narrow]}; set train.rank to {sizes[narrow]} or "
                "less, or train.method: lora"
            )

    def adjust(self, name: str, weights: Tensor, quantized: Quantized) -> Tensor:
        """Return what is quantized instead of a layer's weights (out, in), and keep the layer's start.

        Args:
            name: The weight's name in the model.
            weights: The original ones.
            quantized: Returns the values of the packed form of a tensor.

        Raises:
            IntegrityError: If a weight is not finite.
        """
        path = name.removesuffix(".weight")
        # Eigenvectors take hours on a CPU where the model is large.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if path not in self.paths:
            return weights
        if not is_finite(weights):
            raise IntegrityError(
                f"base_model: {name} holds numbers that are not finite; quantization cannot repair them"
            )
        if self.config.method == "lora-xs":
            left, values, right = top_singular_triplets(weights.to(device), self.config.rank)
            self.matrices[path] = right.cpu(), (left * values).cpu()
            return weights
        if self.config.method == "lq-lora":
            return self._alternate_until_worse(path, weights, quantized, device)
        return self._alternate(path, weights, quantized, device)

    def _alternate(self, path: str, weights: Tensor, quantized: Quantized, device: str) -> Tensor:
        """Alternate between quantizing W - B A and taking B A of what is left (LoftQ, arXiv 2310.08659, alg. 1)."""
        original = weights.float()
        target = original
        for iteration in range(self.config.iterations):
            residual = original - quantized(target.to(weights.dtype)).float()
            if not iteration:
                error_without = vector_norm(residual) ** 2
            a, b = self._factors(residual.to(device))
            packed, target = target, original - b @ a

        self._keep(path, (a, b), vector_norm(original) ** 2, error_without, vector_norm(residual - b @ a) ** 2)
        return packed.to(weights.dtype)

    def _alternate_until_worse(self, path: str, weights: Tensor, quantized: Quantized, device: str) -> Tensor:
        """Alternate between taking B A of W - Q and quantizing Q of W - B A, until the error rises.

        This is algorithm 2 of LQ-LoRA (arXiv 2311.12023). Q is zero in the beginning, so that the adapter gets the
        largest singular vectors of W. What is kept is the best of all, and not the last.
        """
        original = weights.float()
        stored, least = torch.zeros_like(original), torch.tensor(torch.inf)
        for _ in range(self.config.iterations):
            a, b = self._factors((original - stored).to(device))
            target = (original - b @ a).to(weights.dtype)
            stored = quantized(target).float()
            error = vector_norm(original - b @ a - stored) ** 2
            if error >= least:
                break
            least, matrices, packed = error, (a, b), target

        error_without = vector_norm(original - quantized(weights).float()) ** 2
        self._keep(path, matrices, vector_norm(original) ** 2, error_without, least)
        return packed

    def _factors(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and B (out, rank) whose product is nearest to a matrix, on the CPU."""
        left, values, right = (part.cpu() for part in top_singular_triplets(matrix, self.config.rank))
        root = values.sqrt()
        return right * root[:, None], left * root

    def _keep(
        self, path: str, matrices: tuple[Tensor, Tensor], norm: Tensor, error_without: Tensor, error_with: Tensor
    ) -> None:
        self.matrices[path] = matrices
        self._squares += torch.stack([norm, error_without, error_with]).double().cpu()

    def write(self, base_nf4: Path) -> dict[str, float]:
        """Write the start beside the base, and return what it corrects.

        Raises:
            UsageError: If a layer is not quantized, so that no start of it was computed.
        """
        if missing := sorted(self.paths - set(self.matrices)):
            raise UsageError(
                f"train.method: {self.config.method} needs packed layers, and {missing[0]} stays in 16 bits; name the "
                "others in train.target_modules"
            )
        adapter_start.write(base_nf4, self.matrices, self.config.method)
        norm, error_without, error_with = self._squares.tolist()
        if not norm:
            return {}
        return {
            "relative_error_without_start": round((error_without / norm) ** 0.5, 5),
            "relative_error_with_start": round((error_with / norm) ** 0.5, 5),
        }
