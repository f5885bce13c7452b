"""Write the base with its linear layers packed, by transformers, tensor by tensor."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import PreTrainedModel

from components.quantize_model.adapter_starts import StartBuilder
from components.quantize_model.quantization_stats import coverage, is_finite, layer_errors, sufficient_coverage
from qlora_retrain.config.quantize import QuantizeConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.lm import loading
from qlora_retrain.lm.base_formats import BaseFormat
from qlora_retrain.lm.streaming_quantizer import load_quantized

SHARD_SIZE = "5GB"  # set here, so that a new default of transformers cannot change the files


def pack_base(
    config: QuantizeConfig, base_format: BaseFormat, base_model: Path, base_nf4: Path, start: StartBuilder | None
) -> tuple[float, dict[str, float]]:
    """Quantize, save, and check that the saved tensors load to the same model.

    Where there is a `start`, it sees every weight before it is packed.

    Returns:
        The quantized weights as a fraction of those outside embeddings and head, and the error of each kind of layer.

    Raises:
        UsageError: If `base_model` is no causal language model in 16 bits, or too little of it is quantized.
        IntegrityError: If it is unsafe or damaged, or the saved tensors load as others.
    """
    settings, layer_type = base_format.transformers_config(), base_format.layer_type()
    assert settings is not None, "only a format that packs is written here"

    def check_skeleton(model: PreTrainedModel) -> None:
        sufficient_coverage(model, layer_type, config.min_quantized_fraction)
        if start:
            start.select(model)

    # The error of each layer needs both forms, so it is measured before the model is saved and dropped.
    model = load_quantized(
        base_model,
        settings,
        base_nf4,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=config.compute_dtype,
        check_skeleton=check_skeleton,
        adjust=start.adjust if start else None,
    )
    quantized_fraction = coverage(model, layer_type).fraction
    errors = layer_errors(model, layer_type, base_model)
    # The codes of what is not finite may look like any others.
    if faulty := [kind for kind, error in errors.items() if not math.isfinite(error)]:
        raise IntegrityError(
            f"base_model: a weight of its {faulty[-1]} layers holds numbers that are not finite, or too large for "
            "quantize.format; quantization cannot repair them"
        )
    state = _checked_state(model)
    progress.update("quantizing", 1, 3)

    model.config._name_or_path = ""  # a path of this machine must not enter the artifact
    model.save_pretrained(base_nf4, max_shard_size=SHARD_SIZE)
    del model
    progress.update("quantizing", 2, 3)

    # With bfloat16, loading keeps the weights packed, as they are stored.
    if not _is_identical(state, loading.load_nf4(base_nf4, dtype="bfloat16").state_dict()):
        raise IntegrityError("base_nf4: the saved model loads with other tensors than it was saved from")
    return quantized_fraction, errors


def _checked_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return every tensor that is stored: codes, scales, the scales' scales, and what stays in 16 bits.

    Raises:
        IntegrityError: If a number of them is not finite.
    """
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise IntegrityError(
                f"base_model: {name} holds numbers that are not finite; quantization cannot repair them"
            )
    return state


def _is_identical(saved: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> bool:
    """Return whether two states are the same bit by bit."""
    return saved.keys() == loaded.keys() and all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())
