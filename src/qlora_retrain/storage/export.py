"""Bring one export of a version, such as a GGUF file, to a file or a folder; every byte is verified before it appears.

Command: `qlora-retrain models export LINE@ALIAS NAME DEST`
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath

from qlora_retrain.core import hashing, safety
from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage import export_folder, pull, range_download, registry, version_parts
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.atomic_files import destination_errors
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

_FOLDER = "model/exports"


def export(store: Store, reference: str, name: str, destination: Path) -> tuple[Path, ...]:
    """Bring an export to a file or a folder.

    Args:
        store: The store.
        reference: `LINE@ALIAS` or `LINE@VERSION`.
        name: The export, e.g. `gguf-q8_0`.
        destination: A file of the same suffix as one file of the export, which is brought alone; or a folder, which
            gets all of its files.

    Returns:
        The files.

    Raises:
        UsageError: If the version has no such export, or the destination has other files of these names.
        IntegrityError: If a byte differs from what was published, or a file is none that a version may have.
        TryAgain: If the store is busy or the disk is full. The next export goes on where this one stopped.
    """
    release, _ = pull.resolve(store, reference)
    safety.refuse_foreign((file.path for file in release.files), f"{reference}: {release.version}")
    version_parts.refuse_other_content(release, f"{reference}: {release.version}")
    folder = registry.version_folder(release.line, release.version)
    with destination_errors(destination):
        # A link stays one, and the file goes to where it leads.
        targets = [
            (file, Path(os.path.realpath(path)) if path.is_symlink() else path)
            for file, path in _targets(release, name, destination)
        ]
        parent = targets[0][1].parent
        parent.mkdir(parents=True, exist_ok=True)
        with export_folder.assembling(parent, f"{release.line} {name} {targets[0][1].name}") as temporary:
            # Another export to the same place may have ended meanwhile.
            missing = [file for file, path in targets if not _has(path, file)]
            if occupied := next((path for file, path in targets if file in missing and path.exists()), None):
                raise UsageError(f"{occupied}: is there and has other bytes; remove it, or choose another destination")

            range_download.download(store, folder, missing, temporary)
            safety.refuse_unsafe(temporary, f"{release.line} {release.version}")
            for file, path in targets:
                if file in missing:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(temporary / file.path, path)
    return tuple(path for _, path in targets)


def _targets(release: Release, name: str, destination: Path) -> list[tuple[File, Path]]:
    """Return the files of an export with where each goes."""
    prefix = f"{_FOLDER}/{name}/"
    files = [file for file in release.files if file.path.startswith(prefix)]
    if not name or not files:
        names = {PurePosixPath(f.path).parts[2] for f in release.files if f.path.startswith(f"{_FOLDER}/")}
        exports = ", ".join(sorted(names)) or "none"
        raise UsageError(f"{release.line} {release.version}: has no export {name!r}; it has {exports}")
    alone = [file for file in files if PurePosixPath(file.path).suffix == destination.suffix]
    if destination.suffix and len(alone) == 1 and not destination.is_dir():
        return [(alone[0], destination)]
    return [(file, destination / file.path.removeprefix(prefix)) for file in files]


def _has(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.size_bytes and hashing.sha256_file(path) == file.sha256
