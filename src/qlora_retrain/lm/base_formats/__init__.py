"""The base formats, one small file each: how `base_nf4` holds the base, and how its weights are read.

from_settings(quantize).bits_per_weight      for the planner: arithmetic, without torch
from_folder(base_nf4)                         for the steps: the folder's config.json says its format
layer_weight(layer)                           of a loaded layer, whatever its format
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.safety import read_json
from qlora_retrain.lm.base_formats.base_format import BaseFormat as BaseFormat
from qlora_retrain.lm.base_formats.base_format import StorageBits as StorageBits
from qlora_retrain.lm.base_formats.four_bits import FourBits as FourBits
from qlora_retrain.lm.base_formats.int4 import Int4 as Int4
from qlora_retrain.lm.base_formats.mixed_bits import MixedBits as MixedBits
from qlora_retrain.lm.base_formats.packed_linear import PackedFormat as PackedFormat
from qlora_retrain.lm.base_formats.shifted_nf4 import ShiftedNf4 as ShiftedNf4
from qlora_retrain.lm.base_formats.sixteen_bits import SixteenBits as SixteenBits

if TYPE_CHECKING:
    from torch import Tensor

# By the value of `quantize.format`.
FORMATS: dict[str, type[BaseFormat]] = {
    "none": SixteenBits,
    "nf4": FourBits,
    "fp4": FourBits,
    "int4": Int4,
    "nf4-shifted": ShiftedNf4,
    "mixed": MixedBits,
}
# The name in config.json of the quantization of all formats with layers of our own.
OWN_METHOD = "qlora-retrain"


def from_settings(settings: Mapping[str, Any]) -> BaseFormat:
    """Return the format that the values of the section `quantize` name."""
    return FORMATS[settings["format"]].from_settings(settings)


def from_model_config(config: Mapping[str, Any], label: str) -> BaseFormat:
    """Return the format of a model by its config.json.

    Args:
        config: The parsed file.
        label: The folder's name, for messages.

    Raises:
        UsageError: If it is quantized in another way.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return SixteenBits()
    settings = quantization if isinstance(quantization, Mapping) else {}
    own_format = FORMATS.get(settings.get("format", "")) if settings.get("quant_method") == OWN_METHOD else None
    if own_format and issubclass(own_format, PackedFormat):
        try:
            return own_format.from_settings(settings)
        except KeyError as error:
            raise UsageError(
                f"{label}: config.json: quantization_config has no {error}; make the folder again by `quantize_model`"
            ) from error
    if not settings.get("load_in_4bit") or settings.get("bnb_4bit_quant_type") not in FORMATS:
        raise UsageError(
            f"{label}: its config.json has another quantization than those of quantize.format ({', '.join(FORMATS)}); "
            "`quantize_model` makes such a folder from the base's own 16-bit weights"
        )
    return FourBits(
        settings["bnb_4bit_quant_type"],
        bool(settings.get("bnb_4bit_use_double_quant")),
        str(settings.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch."),
    )


def from_folder(folder: Path) -> BaseFormat:
    """Return the format of a model folder.

    Raises:
        UsageError: If it is no model folder, or is quantized in another way.
    """
    path = folder / "config.json"
    document = read_json(path, folder.name) if path.is_file() else None
    if not isinstance(document, Mapping):
        raise UsageError(f"{folder.name}: no config.json; expected a model folder in the Hugging Face layout")
    return from_model_config(document, folder.name)


def layer_weight(layer: Any) -> Tensor:
    """Return the weight (out, in) of a loaded layer, unpacked where it is packed."""
    return weight_reader(layer)(layer)


def weight_reader(layer: Any) -> Callable[[Any], Tensor]:
    """Return what returns the weight of this layer, however often it is asked: its format does not change."""
    packed = (base_format for base_format in FORMATS.values() if base_format.is_packed_layer(layer))
    base_format = next(packed, None)
    return operator.attrgetter("weight") if base_format is None else base_format.layer_weight
