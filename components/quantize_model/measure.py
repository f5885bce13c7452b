"""What quantizing cost: bits a weight, read from the stored tensors, and the error of each kind of layer."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from torch.linalg import vector_norm
from transformers import PreTrainedModel

BLOCK = 64  # weights that share a scale
GROUP = 256  # scales that share a second scale

# Stored once a tensor whatever its size: the levels of both codes, and a small JSON of shapes and the scales' mean.
TABLES = ("quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")


@dataclass(frozen=True, slots=True)
class Bits:
    """Storage of the quantized layers.

    Attributes:
        weights: How many weights are quantized.
        per_weight: Bits that grow with the layer: 4-bit codes, their scales, the scales' scales. This is what the
            method promises and what is checked.
        per_weight_with_tables: The same and the tables of fixed size (about 1.2 KB a tensor): 0.5 % of a model of
            100 M weights, next to nothing in a large one, most of a test's tiny one. Shown, not checked.
    """

    weights: int
    per_weight: float
    per_weight_with_tables: float


def promised_bits(double_quant: bool) -> float:
    """The arithmetic of the method: 4.127 bits a weight with double quantization, 4.5 without."""
    return 4 + (8 / BLOCK + 32 / (BLOCK * GROUP) if double_quant else 32 / BLOCK)


def stored_bits(folder: Path) -> Bits:
    """Add up the bytes of every stored tensor that belongs to a quantized layer."""
    sizes = dict(_stored(folder))
    codes = [name.removesuffix(".absmax") for name in sizes if name.endswith(".weight.absmax")]
    weights = growing = tables = 0
    for code in codes:
        weights += 2 * sizes[code]  # two 4-bit codes a byte
        growing += sizes[code] + sizes[f"{code}.absmax"] + sizes.get(f"{code}.nested_absmax", 0)
        tables += sum(sizes.get(f"{code}.{table}", 0) for table in TABLES)
    if not weights:
        return Bits(0, 0.0, 0.0)
    return Bits(weights, 8 * growing / weights, 8 * (growing + tables) / weights)


def layer_errors(model: PreTrainedModel, base_model: Path) -> dict[str, float]:
    """How far the 4-bit weights are from the original: |W - W4| / |W| (Frobenius), by kind of layer, and of "all".

    Layers that the base's files name otherwise than the model does cannot be compared and are left out.
    """
    wrong: dict[str, float] = defaultdict(float)
    whole: dict[str, float] = defaultdict(float)
    with ExitStack() as stack:
        originals: dict[str, Any] = {}
        for path in sorted(base_model.glob("*.safetensors")):
            opened = stack.enter_context(safe_open(path, "pt"))
            originals |= dict.fromkeys(opened.keys(), opened)
        for name, module in model.named_modules():
            key = f"{name}.weight"
            if not isinstance(module, Linear4bit) or key not in originals:
                continue
            original = originals[key].get_tensor(key).float()
            stored = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            size, distance = float(vector_norm(original)) ** 2, float(vector_norm(stored.sub_(original))) ** 2
            for kind in (name.rsplit(".", 1)[-1], "all"):
                wrong[kind] += distance
                whole[kind] += size
    return {kind: (wrong[kind] / whole[kind]) ** 0.5 if whole[kind] else 0.0 for kind in sorted(whole)}


def _stored(folder: Path) -> Iterator[tuple[str, int]]:
    """Every stored tensor's name and bytes, from the files' headers alone."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, end - begin
