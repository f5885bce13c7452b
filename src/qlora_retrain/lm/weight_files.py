"""Read and write safetensors folders tensor by tensor: sharded and single-file ones.

The whole model is never in memory. Tensors are read one at a time, from a memory map of the file. A file is written
while its tensors are computed, since its header needs only their sizes and not their values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.lm.model_files import INDEX, SINGLE_FILE, weight_paths

if TYPE_CHECKING:
    import torch

_GIB = 1024**3
# The file format's names of types, and torch's. 8-bit floats are missing on purpose, see `SafetensorsFolder.spec`.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_DTYPE_NAMES = {f"torch.{dtype}": name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The entry of a tensor in a file's header; it is known before the tensor is computed."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Return the size of its values in a file."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


class SafetensorsFolder:
    """The tensors of a folder; open it with `with`.

    Attributes:
        names: The tensors' names, in the order of the files and of the tensors in them.
    """

    def __init__(self, folder: Path, single_file: str = SINGLE_FILE) -> None:
        self.folder = folder
        self.names: list[str] = []
        self._single_file = single_file
        self._files: dict[str, Any] = {}  # the open file that holds each tensor
        self._stack = ExitStack()

    def __enter__(self) -> SafetensorsFolder:
        from safetensors import SafetensorError, safe_open

        # safe_open maps a file into memory and reads its header; no tensor is read yet.
        for path in self._paths():
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise IntegrityError(f"{self.folder.name}: {path.name} is damaged or missing: {error}") from error
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                self._files[name] = file
                self.names.append(name)

        if missing := sorted(set(self._index()) - set(self._files)):
            raise IntegrityError(f"{self.folder.name}: {INDEX} lists {missing[0]}, but no file holds it")
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _index(self) -> dict[str, str]:
        """Return the file of each tensor; empty where one file holds them all."""
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return weight_map

    def _paths(self) -> list[Path]:
        # A model may have several files, and which of them count is one answer for all steps. An adapter has one file.
        return weight_paths(self.folder) if self._single_file == SINGLE_FILE else [self.folder / self._single_file]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's type and shape, from its file's header alone.

        Raises:
            IntegrityError: If it is of a type that no supported model holds, such as 8-bit floats.
        """
        import torch

        tensor_slice = self._files[name].get_slice(name)
        if tensor_slice.get_dtype() not in _DTYPES:
            raise IntegrityError(
                f"{self.folder.name}: {name} is {tensor_slice.get_dtype()}; this step needs a 16-bit model"
            )
        dtype = getattr(torch, _DTYPES[tensor_slice.get_dtype()])
        return TensorSpec(name, dtype, tuple(tensor_slice.get_shape()))


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether every number is finite."""
    import torch

    # The extremes of a tensor with a NaN are NaN. Unlike isfinite() of the whole tensor, they need no second tensor.
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def split_into_shards(specs: Sequence[TensorSpec], max_bytes: float) -> list[list[TensorSpec]]:
    """Split tensors, in order, so that no shard exceeds `max_bytes`; a larger tensor is a shard of its own."""
    shards: list[list[TensorSpec]] = [[]]
    shard_bytes = 0
    for spec in specs:
        if shards[-1] and shard_bytes + spec.size_bytes > max_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(spec)
        shard_bytes += spec.size_bytes
    return shards


def write_safetensors(
    folder: Path,
    specs: Sequence[TensorSpec],
    make_tensor: Callable[[str], torch.Tensor],
    max_shard_gib: float,
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write every tensor that `make_tensor` returns, one in memory at a time; return the bytes of all tensors.

    The same tensors give the same bytes, because the names keep their order and headers have no time or version.
    """
    shards = split_into_shards(specs, max_shard_gib * _GIB)
    index: dict[str, str] = {}
    written: list[str] = []

    def on_tensor(name: str) -> None:
        written.append(name)
        on_progress(len(written))

    for number, shard in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, make_tensor, on_tensor)
        index |= dict.fromkeys((spec.name for spec in shard), file)

    # The index is written last: a reader that finds it finds every shard.
    total_bytes = sum(spec.size_bytes for spec in specs)
    if len(shards) > 1:
        document = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(index.items()))}
        (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return total_bytes


def write_file(
    path: Path,
    specs: Sequence[TensorSpec],
    make_tensor: Callable[[str], torch.Tensor],
    on_tensor: Callable[[str], None] = lambda name: None,
) -> None:
    """Write one file, one tensor in memory at a time.

    The layout follows the safetensors documentation: the header's length in 8 bytes, the header as JSON, then the
    values without gaps.
    """
    import torch

    # Readers map the file into memory, so a value must start at a multiple of its size. Wide types therefore go first.
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        offsets = [end, end := end + spec.size_bytes]
        header[spec.name] = {"dtype": _DTYPE_NAMES[str(spec.dtype)], "shape": spec.shape, "data_offsets": offsets}

    # Padded with spaces to a multiple of 8 bytes, so that the values after it are aligned.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in ordered:
            tensor = make_tensor(spec.name)
            if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
                raise IntegrityError(
                    f"{spec.name}: the header says {spec}, the tensor is {tensor.dtype} {tuple(tensor.shape)}"
                )
            if tensor.numel():
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # it would stay in memory while the next one is made
            on_tensor(spec.name)
