"""Add an adapter to a base in int4 without another quantization: the minima of the groups move, the codes stay.

An adapter of QA-LoRA adds one number to all weights of a group: d q + m + u = d q + (m + u). So the trained model is
one in 4 bits already. All that is rounded is m + u, to fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from components.merge_adapter.lora import LoraAdapter
from components.merge_adapter.merge import open_base
from qlora_retrain.core.errors import Diverged
from qlora_retrain.lm import base_formats
from qlora_retrain.lm.base_formats import Int4
from qlora_retrain.lm.base_formats.int4 import GROUP_SIZE, MINIMA, SCALES
from qlora_retrain.lm.base_formats.packed_linear import CODES
from qlora_retrain.lm.weight_files import is_finite

# Of the largest number of A: a cut to a smaller rank rounds each column of a group by itself.
_ROUNDING = 1e-6
Blocks = Callable[[str], Tensor | None]


def applies(base_nf4: Path, adapter: Path) -> bool:
    """Return whether the base is in int4, and the adapter adds one number to all weights of each group."""
    if not isinstance(base_formats.from_folder(base_nf4), Int4):
        return False
    with LoraAdapter(adapter) as lora:
        has_magnitudes = bool(lora.config.get("use_dora"))
        return not has_magnitudes and all(_by_group(lora.update(module)[0]) is not None for module in lora.modules)


@contextmanager
def open_blocks(base_model: Path, base_nf4: Path, adapter: Path) -> Iterator[Blocks]:
    """Open the files, and yield what returns the Q4_1 blocks of a weight with the adapter in it.

    It takes a weight's name in `base_model`, and returns bytes (out, 20 a group): the step and the minimum in fp16, and
    the codes of 32 weights. It returns None for a weight that is in 16 bits in `base_nf4`.
    """
    with LoraAdapter(adapter) as lora, open_base(base_model, base_nf4, lora.modules, dequantized=True) as base:

        def blocks(name: str) -> Tensor | None:
            if name not in base.dequantized_names:
                return None
            layer = base.model_names[name].removesuffix(f".{CODES}")
            codes, scales, minima = (base.nf4.tensor(f"{layer}.{part}") for part in (CODES, SCALES, MINIMA))
            if layer in lora.modules:
                minima = moved(minima, *lora.update(layer))
                if not is_finite(minima):
                    raise Diverged(f"adapter: merging it into {name} gives numbers that are too large for fp16")
            parts = [part.unsqueeze(-1).view(torch.uint8) for part in (scales, minima)]
            return torch.cat([*parts, codes.view(*scales.shape, GROUP_SIZE // 2)], dim=-1).flatten(1)

        yield blocks


def moved(minima: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the minima (out, groups) of B A added, rounded once to fp16.

    Args:
        minima: Those of the base.
        a: A (rank, in) in fp64, the same for all inputs of a group.
        b: B (out, rank) with the scale, in fp64.
    """
    a_by_group = _by_group(a)
    assert a_by_group is not None, "the caller asks `applies` first"
    return (minima.double() + b @ a_by_group).half()


def _by_group(a: Tensor) -> Tensor | None:
    """Return A (rank, groups) of A (rank, in); None where a group's inputs have different numbers."""
    if a.shape[1] % GROUP_SIZE:
        return None
    groups = a.view(len(a), -1, GROUP_SIZE)
    means = groups.mean(-1, keepdim=True)
    is_constant = bool((groups - means).abs().max() <= _ROUNDING * a.abs().max())
    return means.squeeze(-1) if is_constant else None
