"""Folders of safetensors, tensor by tensor: reading sharded, single-file and 4-bit ones, writing shards of a size.

A model is never whole in memory: reading yields one tensor at a time, writing holds one shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qlora_retrain.errors import IntegrityError

_GIB = 1024**3
_INDEX = "model.safetensors.index.json"
_DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F64", "F32", "BF16", "F16")


class Weights:
    """The tensors of a folder; open it with `with`.

    Attributes:
        names: In the order of the files and of the tensors in them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Weights:
        for path in self._paths():
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise IntegrityError(f"{self.folder.name}: {path.name} is damaged or missing: {error}") from error
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                self._files[name] = file
                self.names.append(name)
        if lost := sorted(set(self._index()) - set(self._files)):
            raise IntegrityError(f"{self.folder.name}: {_INDEX} lists {lost[0]}, but no file holds it")
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _index(self) -> dict[str, str]:
        """The file of each tensor; empty where one file holds them all."""
        path = self.folder / _INDEX
        if not path.is_file():
            return {}
        listed: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return listed

    def _paths(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self._index().values()) or {"model.safetensors"})]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor."""
        found: torch.Tensor = self._files[name].get_tensor(name)
        return found

    def bytes_as_bf16(self, name: str) -> int:
        """What the tensor takes when floats are stored as bf16, read from the header alone."""
        piece = self._files[name].get_slice(name)
        count = 1
        for size in piece.get_shape():
            count *= size
        kind = piece.get_dtype()
        return count * (2 if kind in _FLOATS else _DTYPE_BYTES.get(kind, 8))

    def quantized(self, name: str) -> bool:
        """Whether bitsandbytes stored this weight in 4 bits."""
        return any(f"{name}.quant_state.bitsandbytes__{kind}" in self._files for kind in ("nf4", "fp4"))

    def dequantized(self, name: str) -> torch.Tensor:
        """A 4-bit weight as the live model multiplies with it."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {n: self.tensor(n) for n in self.names if n.startswith(f"{name}.")}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        found: torch.Tensor = dequantize_4bit(self.tensor(name), state)
        return found


def shards(sizes: Sequence[tuple[str, int]], max_bytes: float) -> list[list[str]]:
    """Names in order, cut so that no shard exceeds `max_bytes`; a larger tensor stands alone."""
    found: list[list[str]] = [[]]
    used = 0
    for name, size in sizes:
        if found[-1] and used + size > max_bytes:
            found.append([])
            used = 0
        found[-1].append(name)
        used += size
    return found


def write(
    folder: Path, base: Weights, make: Callable[[str], torch.Tensor], max_gib: float, tick: Callable[[int], None]
) -> int:
    """Write every tensor of `base` as `make` returns it; return the bytes of all tensors.

    The same tensors give the same bytes: names in the base's order, no time and no version in the headers.
    """
    parts = shards([(name, base.bytes_as_bf16(name)) for name in base.names], max_gib * _GIB)
    total = done = 0
    index: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = make(name).contiguous()
            done += 1
            tick(done)
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(parts) > 1:
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / _INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return total


def unused(modules: Iterable[str], base: Weights) -> list[str]:
    """Modules that the base has no weight for."""
    return sorted(module for module in modules if f"{module}.weight" not in base)
