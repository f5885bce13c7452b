"""Measure each layer's error in 4 and in 8 bits, and choose the layers that get 8 (`quantize.format: mixed`)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from components.quantize_model.adapter_starts import Quantized
from components.quantize_model.quantization_stats import squared_norms, sufficient_coverage
from qlora_retrain.core import progress
from qlora_retrain.lm.base_formats.block_layouts import Int8Layout
from qlora_retrain.lm.base_formats.mixed_bits import MixedBits
from qlora_retrain.lm.streaming_quantizer import load_quantized


def choose_layers(base_format: MixedBits, base_model: Path, base_nf4: Path, min_fraction: float) -> MixedBits:
    """Return the format with its layers chosen; the base is read and packed once for this, and nothing is kept.

    Raises:
        UsageError: If `base_model` is no causal language model in 16 bits, or too little of it is quantized.
        IntegrityError: If it is unsafe or damaged.
    """
    sizes, avoided_errors = dict[str, int](), dict[str, float]()

    def measure(name: str, weights: Tensor, in_4_bits: Quantized) -> Tensor:
        path, in_8_bits = name.removesuffix(".weight"), Int8Layout(base_format.compute_dtype)
        (_, error_4), (_, error_8) = (
            squared_norms(weights, values) for values in (in_4_bits(weights), in_8_bits.unpack(in_8_bits.pack(weights)))
        )
        sizes[path], avoided_errors[path] = weights.numel(), error_4 - error_8
        return weights

    load_quantized(
        base_model,
        base_format.transformers_config(),
        base_nf4,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=base_format.compute_dtype,
        check_skeleton=lambda model: sufficient_coverage(model, base_format.layer_type(), min_fraction),
        adjust=measure,
    )
    with_choice = base_format.choose(sizes, avoided_errors)
    count, bits = len(with_choice.layers_in_8_bits), with_choice.bits_per_weight
    progress.say(
        f"quantize.format: mixed: {count} of {len(sizes)} linear layers have 8 bits and the others 4: {bits:.3f} "
        f"bits per weight, of {base_format.bits_per_weight:g} allowed"
    )
    return with_choice
