"""Store the base model in the line's format, once: packed in few bits (NF4 by default), or in 16 bits.

The weights are read, packed and written one tensor at a time. So the step needs memory for the largest tensor, and not
for the model.

Reads base_model: a Hugging Face folder with 16- or 32-bit safetensors weights and a tokenizer.
Makes base_nf4: the same model, packed in the format or in 16 bits, its tokenizer files copied byte by byte,
and `quantization.json` with what was measured: bits per weight, the quantized fraction, sizes, the error of each kind
of layer.
Refuses (13) an unsafe or damaged base, and a result whose size is not the expected one; (12) what is no base model, one
of which too little is in linear layers, and one into whose files no adapter could be merged.

Command: `python -m components.quantize_model --plan URI`
"""

from __future__ import annotations

import json
from pathlib import Path

from components.quantize_model.adapter_starts import StartBuilder
from components.quantize_model.bit_choice import choose_layers
from components.quantize_model.copy_base import copy_base
from components.quantize_model.pack_base import pack_base
from qlora_retrain.config.quantize import QuantizeConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.lm import base_formats
from qlora_retrain.lm.base_formats import BaseFormat, MixedBits, StorageBits
from qlora_retrain.lm.model_files import weight_paths
from qlora_retrain.lm.tokenizer_files import TOKENIZER_FILES, copy_files
from qlora_retrain.lm.weight_files import SafetensorsFolder

TOLERANCE = 0.01  # relative, of the stored bits per weight against the method's arithmetic


def run(config: QuantizeConfig, base_model: Path, base_nf4: Path) -> StepResult:
    """Write the base in its format, measure the stored tensors, and check that they load to the same model.

    Raises:
        UsageError: If `base_model` is no causal language model in 16 bits with a tokenizer, or too little of it is in
            linear layers.
        IntegrityError: If it is unsafe or damaged, or the stored form does not have the expected bits or tensors.
    """
    progress.update("quantizing", 0, 3)
    base_format = base_formats.from_settings(config.model_dump())
    if isinstance(base_format, MixedBits):
        base_format = choose_layers(base_format, base_model, base_nf4, config.min_quantized_fraction)
    quantized_fraction = 0.0
    start = StartBuilder(config) if config.adapter_start else None
    if base_format.is_packed:
        quantized_fraction, errors = pack_base(config, base_format, base_model, base_nf4, start)
    else:
        errors = copy_base(config.compute_dtype, base_model, base_nf4, config.min_quantized_fraction)
    _copy_tokenizer(base_model, base_nf4)
    start_errors = start.write(base_nf4) if start else {}

    # Another version of bitsandbytes or transformers could silently store something else.
    bits, expected = _stored_bits(base_format, base_nf4), base_format.bits_per_weight
    if abs(bits.per_weight / expected - 1) > TOLERANCE:
        raise IntegrityError(
            f"base_nf4: {bits.per_weight:.4f} bits per weight are stored where {expected:.4f} are expected; "
            "what is installed does not quantize as this step expects; install the versions of environment.lock"
        )
    progress.update("quantizing", 3, 3, bits_per_weight=bits.per_weight)

    # These numbers go to the manifest and, with the errors by layer, to quantization.json.
    numbers = {
        "bits_per_weight": round(bits.per_weight, 5),
        "bits_per_weight_with_tables": round(bits.per_weight_with_tables, 5),
        "bits_per_weight_promised": round(expected, 5),
        "quantized_weights": bits.weights if base_format.is_packed else 0,
        "quantized_fraction": round(quantized_fraction, 5),
        "relative_error": round(errors["all"], 5),
        "size_bytes": _weights_bytes(base_nf4),
        "base_bytes": _weights_bytes(base_model),
        **start_errors,
    }
    document = {
        "settings": config.identity(),
        **numbers,
        **({"layers_in_8_bits": sorted(base_format.layers_in_8_bits)} if isinstance(base_format, MixedBits) else {}),
        "relative_error_by_layer": {name: round(value, 5) for name, value in errors.items() if name != "all"},
    }
    (base_nf4 / "quantization.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for path in (path for path in base_nf4.rglob("*") if path.is_file()):
        path.chmod(0o644)  # safetensors writes 0600, which a consumer under another user could not read
    return StepResult(numbers)


def _stored_bits(base_format: BaseFormat, folder: Path) -> StorageBits:
    with SafetensorsFolder(folder) as tensors:
        return base_format.storage({name: tensors.spec(name) for name in tensors.names})


def _copy_tokenizer(base_model: Path, base_nf4: Path) -> None:
    # The result has a config.json of its own. The chat template is checked with the data: a line may name one.
    copy_files(base_model, base_nf4, [pattern for pattern in TOKENIZER_FILES if pattern != "config.json"])


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_paths(folder))
