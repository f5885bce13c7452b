"""What a version may consist of: files that this project writes, of which none asks for code."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_retrain.core import safety
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.store import Store


def refuse_unsafe(store: Store, folder: str, files: Sequence[File]) -> None:
    """Look at the files of a version in the store, whose bytes were just compared with their hashes.

    Raises:
        IntegrityError: For a file that this project does not write, or one that asks for code.
    """
    label = f"{store.uri}/{folder}"
    safety.refuse_foreign((file.path for file in files), label)
    safety.refuse_content(
        ((file.path, file.size_bytes) for file in files),
        lambda path, size_bytes: store.read_start(f"{folder}/{path}", size_bytes),
        label,
    )
