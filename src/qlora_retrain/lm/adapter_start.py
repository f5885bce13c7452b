"""The matrices from which an adapter starts, where its method computes them of the original weights.

`quantize_model` writes them beside the packed base, because no singular value decomposition can be repeated bit by bit:
training, resuming and merging must have the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_retrain.core.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

CORRECTING = ("loftq", "lq-lora")  # the methods whose start is what the stored base lacks of the original one
FILE = "adapter_start/start.safetensors"  # in a folder, since a file beside the weights would be taken for weights


def write(base_nf4: Path, matrices: Mapping[str, tuple[Tensor, Tensor]], method: str) -> None:
    """Write A (rank, in) and B (out, rank) of each layer, by its path in the model."""
    from safetensors.torch import save_file

    path = base_nf4 / FILE
    path.parent.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in matrices.items():
        tensors |= {f"{name}.A": a.contiguous(), f"{name}.B": b.contiguous()}
    save_file(tensors, path, metadata={"format": "pt", "method": method})


def read(base_nf4: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each layer, by its path in the model; nothing where the base has no start.

    Raises:
        IntegrityError: If the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = base_nf4 / FILE
    if not path.is_file():
        return {}
    try:
        tensors = load_file(path)
        names = sorted({name.rpartition(".")[0] for name in tensors})
        return {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}
    except (SafetensorError, KeyError) as error:
        raise IntegrityError(f"{base_nf4.name}/{FILE}: damaged: {error}") from error


def corrects_base(base_nf4: Path) -> bool:
    """Return whether the start beside a base is what the base lacks of the original weights."""
    from safetensors import safe_open

    path = base_nf4 / FILE
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return file.metadata()["method"] in CORRECTING
