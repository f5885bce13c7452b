"""Folders of safetensors, tensor by tensor: reading sharded, single-file and 4-bit ones, writing shards of a size.

A model is never in memory: reading yields one tensor at a time, from a map of the file; a file is written as its
tensors are made, since its header needs their sizes and not their values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qlora_retrain.core.errors import IntegrityError

_GIB = 1024**3
_INDEX = "model.safetensors.index.json"
_FORMS = ("nf4", "fp4")  # of bitsandbytes
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # of a 4-bit weight, with double quantization
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Spec:
    """What is known of a tensor before it is made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """What its values take in a file."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


class Weights:
    """The tensors of a folder; open it with `with`.

    Attributes:
        names: In the order of the files and of the tensors in them.
    """

    def __init__(self, folder: Path, single: str = "model.safetensors") -> None:
        self.folder = folder
        self.names: list[str] = []
        self._single = single
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
        return [self.folder / name for name in sorted(set(self._index().values()) or {self._single})]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor."""
        found: torch.Tensor = self._files[name].get_tensor(name)
        return found

    def spec(self, name: str) -> Spec:
        """A tensor's type and shape, from its file's header alone.

        Raises:
            IntegrityError: If it is of a type that no model of ours holds, such as one of 8-bit floats.
        """
        piece = self._files[name].get_slice(name)
        if piece.get_dtype() not in _DTYPES:
            raise IntegrityError(f"{self.folder.name}: {name} is {piece.get_dtype()}; a 16-bit model is wanted")
        return Spec(name, _DTYPES[piece.get_dtype()], tuple(piece.get_shape()))

    def quantized(self, name: str) -> bool:
        """Whether bitsandbytes stored this weight in 4 bits."""
        return any(f"{name}.quant_state.bitsandbytes__{form}" in self._files for form in _FORMS)

    def dequantized(self, name: str) -> torch.Tensor:
        """A 4-bit weight as the live model multiplies with it."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        keys = [f"{name}.{part}" for part in (*_PARTS, *(f"quant_state.bitsandbytes__{form}" for form in _FORMS))]
        parts = {key: self.tensor(key) for key in keys if key in self._files}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        found: torch.Tensor = dequantize_4bit(self.tensor(name), state)
        return found


def finite(tensor: torch.Tensor) -> bool:
    """Whether every number is finite. The extremes of a tensor with a NaN are NaN; they need no second tensor."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def shards(specs: Sequence[Spec], max_bytes: float) -> list[list[Spec]]:
    """Tensors in order, cut so that no shard exceeds `max_bytes`; a larger tensor stands alone."""
    found: list[list[Spec]] = [[]]
    used = 0
    for spec in specs:
        if found[-1] and used + spec.size_bytes > max_bytes:
            found.append([])
            used = 0
        found[-1].append(spec)
        used += spec.size_bytes
    return found


def write(
    folder: Path,
    specs: Sequence[Spec],
    make: Callable[[str], torch.Tensor],
    max_gib: float,
    tick: Callable[[int], None] = lambda done: None,
) -> int:
    """Write every tensor as `make` returns it, one in memory at a time; return the bytes of all tensors.

    The same tensors give the same bytes: names in the order given, no time and no version in the headers.
    """
    parts = shards(specs, max_gib * _GIB)
    index: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _write_file(folder / file, part, make, lambda: tick(len(index)), index)
    total = sum(spec.size_bytes for spec in specs)
    if len(parts) > 1:
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / _INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return total


def _write_file(
    path: Path,
    specs: Sequence[Spec],
    make: Callable[[str], torch.Tensor],
    tick: Callable[[], None],
    index: dict[str, str],
) -> None:
    """One file: the length of the header, the header (JSON), the values, end to end (the format's own page)."""
    # Readers make tensors of the mapped file, so a value must start at a multiple of its size: wide types go first.
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        offsets = [end, end := end + spec.size_bytes]
        header[spec.name] = {"dtype": _WORDS[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in ordered:
            tensor = make(spec.name)
            if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
                raise IntegrityError(
                    f"{spec.name}: {spec} was announced, {tensor.dtype} {tuple(tensor.shape)} was made"
                )
            if tensor.numel():
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # or it would be there while the next one is made
            index[spec.name] = path.name
            tick()
