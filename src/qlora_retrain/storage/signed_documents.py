"""Find the signed documents of a store, and say of each which role signs it and whose signature it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from qlora_retrain.storage import artifact, signatures
from qlora_retrain.storage.keys import PLANNER, publish_role
from qlora_retrain.storage.store import NotFound, Store, is_valid_path

# As patterns of paths.
_PATTERNS = (
    "runs/*/plan.json",
    "artifacts/*/*/_manifest.json",
    "scratch/*/_complete.json",
    "histories/*/datasets/*.json",
    "models/*/versions/*/manifest.json",
    "models/*/aliases/*.json",
    "models/*/audit/*.json",
)


def is_one(path: str) -> bool:
    """Return whether a path is that of a signed document."""
    return any(fnmatchcase(path, pattern) for pattern in _PATTERNS)


def read_all(store: Store) -> Iterator[tuple[str, bytes]]:
    """Return the path and the bytes of each."""
    for entry in store.list(""):
        # What others put there can have any name.
        if is_one(entry.path) and is_valid_path(entry.path):
            with contextlib.suppress(NotFound):  # removed while this reads
                yield entry.path, store.read(entry.path).data


def signer(path: str, data: bytes) -> tuple[str, str | None, dict[str, Any]]:
    """Return the role that signs a document of this path, the key whose valid signature it holds, and its fields."""
    try:
        fields = signatures.parse_fields(data)
    except ValueError:
        fields = {}
    folder, name, *below = path.split("/")
    role = {"runs": PLANNER, "histories": PLANNER, "scratch": name, "models": publish_role(name)}.get(folder)
    role = role or artifact.signing_role(name, below[0], fields)
    return role, signatures.signer_of(signatures.signed_path(path), fields), fields
