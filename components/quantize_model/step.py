"""Store the base model in 4 bits (NF4, by default with double quantization), once, on a GPU where there is one.

The weights are read, packed and written one tensor at a time. So the step needs memory for the largest tensor, and not
for the model.

Reads base_model: a Hugging Face folder with 16- or 32-bit safetensors weights and a tokenizer.
Makes base_nf4: the same model pre-quantized by bitsandbytes, its tokenizer files copied byte by byte, and
`quantization.json` with what was measured: bits per weight, the quantized fraction, sizes, the error of each kind of
layer.
Refuses (13) an unsafe or damaged base, and a result whose size is not the expected one; (12) what is no base model, one
of which too little becomes 4-bit, and one into whose files no adapter could be merged.

Command: `python -m components.quantize_model --plan URI`
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from components.quantize_model.adapter_starts import StartBuilder
from components.quantize_model.quantization_stats import (
    coverage,
    expected_bits,
    is_finite,
    layer_errors,
    stored_bits,
    sufficient_coverage,
)
from qlora_retrain.config.sections import QuantizeConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.lm import loading
from qlora_retrain.lm.model_files import weight_paths
from qlora_retrain.lm.streaming_quantizer import load_quantized
from qlora_retrain.lm.tokenizer_files import TOKENIZER_FILES, copy_files

SHARD_SIZE = "5GB"  # set here, so that a new default of transformers cannot change the files
TOLERANCE = 0.01  # relative, of the stored bits per weight against the method's arithmetic


def run(config: QuantizeConfig, base_model: Path, base_nf4: Path) -> StepResult:
    """Quantize, save, measure the saved tensors, and check that they load to the same model.

    Raises:
        UsageError: If `base_model` is no causal language model in 16 bits with a tokenizer, or too little of it is
            quantized.
        IntegrityError: If it is unsafe or damaged, or the stored form does not have the expected bits or tensors.
    """
    # The error of each layer needs both forms, so it is measured before the model is saved and dropped.
    progress.update("quantizing", 0, 3)
    start = StartBuilder(config) if config.adapter_start else None
    model = _quantize(config, base_model, base_nf4, start)
    quantized_fraction = coverage(model).fraction
    errors = layer_errors(model, base_model)
    # The 4-bit codes of what is not finite may look like any others.
    if faulty := [kind for kind, error in errors.items() if not math.isfinite(error)]:
        raise IntegrityError(
            f"base_model: a weight of its {faulty[-1]} layers holds numbers that are not finite, or too large for "
            "float32; quantization cannot repair them"
        )
    state = _checked_state(model)
    progress.update("quantizing", 1, 3)

    model.config._name_or_path = ""  # a path of this machine must not enter the artifact
    model.save_pretrained(base_nf4, max_shard_size=SHARD_SIZE)
    del model
    _copy_tokenizer(base_model, base_nf4)
    start_errors = start.write(base_nf4) if start else {}
    progress.update("quantizing", 2, 3)

    # Another version of bitsandbytes could silently store other blocks or scales.
    bits = stored_bits(base_nf4)
    expected = expected_bits(config.double_quant)
    if abs(bits.per_weight / expected - 1) > TOLERANCE:
        raise IntegrityError(
            f"base_nf4: {bits.per_weight:.4f} bits per weight are stored where {expected:.4f} are expected; "
            "the installed bitsandbytes does not quantize as this step expects"
        )
    # With bfloat16, loading keeps the weights packed, as they are stored.
    if not _is_identical(state, loading.load_nf4(base_nf4, dtype="bfloat16").state_dict()):
        raise IntegrityError("base_nf4: the saved model loads with other tensors than it was saved from")
    progress.update("quantizing", 3, 3, bits_per_weight=bits.per_weight)

    # These numbers go to the manifest and, with the errors by layer, to quantization.json.
    numbers = {
        "bits_per_weight": round(bits.per_weight, 5),
        "bits_per_weight_with_tables": round(bits.per_weight_with_tables, 5),
        "bits_per_weight_promised": round(expected, 5),
        "quantized_weights": bits.weights,
        "quantized_fraction": round(quantized_fraction, 5),
        "relative_error": round(errors["all"], 5),
        "size_bytes": _weights_bytes(base_nf4),
        "base_bytes": _weights_bytes(base_model),
        **start_errors,
    }
    document = {
        "settings": config.identity(),
        **numbers,
        "relative_error_by_layer": {name: round(value, 5) for name, value in errors.items() if name != "all"},
    }
    (base_nf4 / "quantization.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for path in (path for path in base_nf4.rglob("*") if path.is_file()):
        path.chmod(0o644)  # safetensors writes 0600, which a consumer under another user could not read
    return StepResult(numbers)


def _quantize(config: QuantizeConfig, base_model: Path, base_nf4: Path, start: StartBuilder | None) -> PreTrainedModel:
    """Load the base model with its linear layers quantized; refuse one that hardly has any before it is read."""

    def check_skeleton(model: PreTrainedModel) -> None:
        sufficient_coverage(model, config.min_quantized_fraction)
        if start:
            start.select(model)

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, config.compute_dtype),
    )
    return load_quantized(
        base_model,
        settings,
        base_nf4,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=config.compute_dtype,
        check_skeleton=check_skeleton,
        adjust=start.adjust if start else None,
    )


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


def _copy_tokenizer(base_model: Path, base_nf4: Path) -> None:
    # The 4-bit base has a config.json of its own. The chat template is checked with the data: a line may name one.
    copy_files(base_model, base_nf4, [pattern for pattern in TOKENIZER_FILES if pattern != "config.json"])


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_paths(folder))
