"""Write the base in 16 bits, tensor by tensor, under the names of its own files: `quantize.format: none`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from components.quantize_model.quantization_stats import ErrorSums, is_finite, sufficient_coverage
from qlora_retrain.core import progress, safety
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.lm import loading, model_files
from qlora_retrain.lm.weight_files import SafetensorsFolder, TensorSpec, write_safetensors

SHARD_GIB = 5.0
_TENSORS_BETWEEN_UPDATES = 100


def copy_base(compute_dtype: str, base_model: Path, base_nf4: Path, min_fraction: float) -> dict[str, float]:
    """Copy every tensor, floating-point ones in the given type, and check that the result loads.

    Returns:
        The relative error that rounding gives each kind of matrix; 0 where the base has the type already.

    Raises:
        UsageError: If `base_model` is no causal language model in 16 or 32 bits, or too little of it is in linear
            layers.
        IntegrityError: If it is unsafe or damaged, or has numbers that the type cannot hold.
    """
    # In its own type the model stays in the files' pages, so this reads no weight.
    sufficient_coverage(loading.load_base(base_model, dtype="stored"), torch.nn.Linear, min_fraction)

    sums, dtype = ErrorSums(), getattr(torch, compute_dtype)
    with SafetensorsFolder(base_model) as base:
        specs = [_stored_spec(base.spec(name), dtype) for name in base.names]
        dtypes = {spec.name: spec.dtype for spec in specs}

        def make_tensor(name: str) -> torch.Tensor:
            original = base.tensor(name)
            tensor = original.to(dtypes[name])
            if tensor.is_floating_point():
                if not is_finite(tensor):
                    raise IntegrityError(
                        f"base_model: {name} holds numbers that are not finite, or too large for {compute_dtype}"
                    )
                if tensor.dim() > 1:
                    sums.add(name, original, tensor)
            return tensor

        def on_progress(done: int) -> None:
            if done % _TENSORS_BETWEEN_UPDATES == 0 or done == len(specs):
                progress.update("copying", done, len(specs))

        write_safetensors(base_nf4, specs, make_tensor, SHARD_GIB, on_progress)
    document = safety.read_json(base_model / "config.json", base_model.name)
    model_files.write_config(document, compute_dtype, base_nf4)
    loading.load_nf4(base_nf4, dtype=compute_dtype)
    return sums.errors()


def _stored_spec(spec: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    return replace(spec, dtype=dtype) if spec.dtype.is_floating_point else spec
