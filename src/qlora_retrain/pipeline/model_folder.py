"""Read a model folder's small files, and the header of its weights, wherever it is: in a store or on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qlora_retrain.core import safety
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.storage.sources import PinnedSource, open_source
from qlora_retrain.storage.store import MAX_DOCUMENT_BYTES

LABEL = "sources.base_model"
# Headers have less than 1 MiB; the format allows 100 MB, which would take gigabytes once parsed.
_MAX_HEADER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ModelFolder:
    """A model's files, wherever they are.

    Attributes:
        names: Their relative paths.
        read: Reads a small file.
        read_start: Reads the first bytes of a file.
        left_out: Further files of the source, which are not read.
        has_weights: Whether the weights should be among them; a step may read the tokenizer's files alone.
    """

    names: frozenset[str]
    read: Callable[[str], bytes]
    read_start: Callable[[str, int], bytes]
    has_weights: bool = True
    left_out: frozenset[str] = frozenset()

    @classmethod
    def from_source(cls, source: PinnedSource) -> ModelFolder:
        """Look at a source whose files are listed."""
        store = open_source(source.uri)
        names = frozenset(file.path for file in source.files)

        def read(path: str) -> bytes:
            limit = safety.max_bytes(path) or MAX_DOCUMENT_BYTES
            data = store.read_start(path, limit + 1)
            safety.refuse_large(path, len(data), LABEL)
            return data

        return cls(names, cache(read), store.read_start, left_out=frozenset(source.left_out))

    @classmethod
    def from_path(cls, folder: Path, *, has_weights: bool) -> ModelFolder:
        """Look at a folder on disk."""

        def read_start(path: str, size_bytes: int) -> bytes:
            with (folder / path).open("rb") as file:
                return file.read(size_bytes)

        names = frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return cls(names, cache(lambda path: (folder / path).read_bytes()), read_start, has_weights)

    def read_json(self, path: str) -> Any:
        """Return a parsed JSON file; raise `IntegrityError` where it is none."""
        return safety.parse_json(path, self.read(path), LABEL)

    def read_objects(self, *paths: str) -> dict[str, dict[str, Any]]:
        """Return the JSON objects in those of the files that exist, by path."""
        documents = {path: self.read_json(path) for path in paths if path in self.names}
        for path, document in documents.items():
            if not isinstance(document, dict):
                raise IntegrityError(f"{LABEL}: {path} is not a JSON object")
        return documents

    def header(self, path: str) -> dict[str, Any]:
        """Return the entry of each tensor in a safetensors file; empty where the file is no such file."""
        size_bytes = int.from_bytes(self.read_start(path, 8), "little")
        if not 0 < size_bytes <= _MAX_HEADER_BYTES:
            return {}
        try:
            document = json.loads(self.read_start(path, 8 + size_bytes)[8:])
        # The step that loads the weights reports a damaged file.
        except (ValueError, RecursionError):
            return {}
        return {k: v for k, v in document.items() if k != "__metadata__"} if isinstance(document, dict) else {}
