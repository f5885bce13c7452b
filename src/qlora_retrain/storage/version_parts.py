"""The parts of a version that a consumer may ask for: `adapter`, `model`, `exports/NAME`.

What is in neither of the two folders, such as the card, the recipe and the reports, belongs to every part.
"""

from __future__ import annotations

from collections.abc import Collection

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.registry_documents import Release

ADAPTER, MODEL = "adapter", "model"
_EXPORTS = "exports/"
_WEIGHTS = (".safetensors", ".gguf")


def select(release: Release, parts: Collection[str]) -> tuple[File, ...]:
    """Return the files of some parts of a version; of no parts, all files.

    Raises:
        UsageError: If the version has no part of that name.
    """
    if not parts:
        return release.files
    parts_of = {file.path: _parts_of(file.path) for file in release.files}
    available = names(release)
    # A shell's unset variable is an empty name, and no file belongs to that.
    unknown = [part for part in parts if part not in available]
    if unknown:
        raise UsageError(
            f"{release.line} {release.version}: has no part {unknown[0] or 'with an empty name'}; it has "
            f"{', '.join(available) or 'none'}"
        )
    return tuple(f for f in release.files if not parts_of[f.path] or parts_of[f.path] & set(parts))


def names(release: Release) -> list[str]:
    """Return the parts that a version has."""
    parts = {part for file in release.files for part in _parts_of(file.path)}
    # Its tokenizer alone is no adapter: `publish.parts` may leave that out.
    return sorted(parts if release.parts(ADAPTER) else parts - {ADAPTER})


def refuse_other_content(release: Release, label: str) -> None:
    """Compute the hash of a version's content again, by which a rollback rejects it.

    Raises:
        IntegrityError: If the manifest says another one.
    """
    content = hashing.content_hash(
        (file.path, file.sha256) for file in release.files if file.path.startswith((f"{ADAPTER}/", f"{MODEL}/"))
    )
    if content != release.content_hash:
        raise IntegrityError(
            f"{label}: the manifest says that its content has the hash {release.content_hash[:12]}, and its files give "
            f"{content[:12]}; somebody else wrote it"
        )


def _parts_of(path: str) -> set[str]:
    """Return the parts that a file of a version belongs to; empty for those that every part has."""
    folder, _, below = path.partition("/")
    if folder == ADAPTER:
        return {ADAPTER}
    if folder != MODEL:
        return set()
    if below.startswith(_EXPORTS) and "/" in below.removeprefix(_EXPORTS):
        return {_EXPORTS + below.removeprefix(_EXPORTS).partition("/")[0]}
    # Its tokenizer and chat format are those that the adapter was trained with.
    return {MODEL} if path.endswith(_WEIGHTS) else {MODEL, ADAPTER}
