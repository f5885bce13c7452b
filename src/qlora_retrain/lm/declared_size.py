"""Refuse a config.json that declares another model than its weights are, before the library makes room for it.

A config.json may declare any number of layers, labels or positions. transformers allocates them all, and fills what the
weights lack with random numbers. So the model is first built without memory for its weights, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_retrain.core.bounds import Bounds, TimeIsUp
from qlora_retrain.core.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Of building a model without its weights. One of 126 layers takes a second and a few MiB.
MAX_SECONDS = 20.0
_MAX_BYTES = 2 << 30
# Headers have less than 1 MiB; the format allows 100 MB, which takes gigabytes and a minute to read.
_MAX_HEADER_BYTES = 16 << 20
# A model may keep tables beside its weights, such as masks. What is missing exactly is reported where it is loaded.
_MAX_EXCESS, _FREE_NUMBERS = 2, 1 << 24


def read_config(folder: Path, label: str) -> PreTrainedConfig:
    """Return the config of a model folder; raise `UsageError` for one that takes too long or too much memory."""
    from transformers import AutoConfig

    with _bounds(label):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config


def refuse_unfit(config: PreTrainedConfig, paths: Sequence[Path], label: str) -> None:
    """Compare what a config declares with what the weights' files hold.

    Raises:
        UsageError: If the model cannot be built within the bounds.
        IntegrityError: If it is far larger than its weights, or two files hold one tensor.
    """
    import torch
    from transformers import AutoModelForCausalLM

    sizes = _sizes(paths, label)
    num_layers, num_stored = getattr(config, "num_hidden_layers", 0), sum(sizes.values())
    if num_layers > len(sizes):
        raise IntegrityError(
            f"{label}: its weights do not fit its config.json: it declares {num_layers:,} layers, and the files hold "
            f"{len(sizes):,} tensors; fetch the model again, or choose another one"
        )
    with _bounds(label), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_declared = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if num_declared > _MAX_EXCESS * num_stored + _FREE_NUMBERS:
        raise IntegrityError(
            f"{label}: its weights do not fit its config.json: it declares {num_declared:,} numbers, and the files "
            f"hold {num_stored:,}; fetch the model again, or choose another one"
        )


def _sizes(paths: Sequence[Path], label: str) -> dict[str, int]:
    """Return how many numbers each tensor has, from the files' headers alone."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for path in paths:
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise IntegrityError(
                f"{label}: {path.name}: its weights are damaged: expected a safetensors header of at most "
                f"{_MAX_HEADER_BYTES >> 20} MiB, found {header_bytes:,} bytes; fetch the model again"
            )
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                # Readers differ in which of them they take.
                if name in sizes:
                    raise IntegrityError(
                        f"{label}: two files hold the tensor {name}, e.g. {path.name}; fetch the model again"
                    )
                sizes[name] = math.prod(file.get_slice(name).get_shape())
    return sizes


@contextmanager
def _bounds(label: str) -> Iterator[None]:
    try:
        with Bounds(_MAX_BYTES, MAX_SECONDS):
            yield
    except (TimeIsUp, MemoryError) as error:
        raise UsageError(
            f"{label}: config.json declares a model that takes more than {MAX_SECONDS:g} s or {_MAX_BYTES >> 20:,} MiB "
            "to build without its weights; choose another model"
        ) from error
