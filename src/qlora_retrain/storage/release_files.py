"""What a version may consist of: files that this project writes, of which none asks for code."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from qlora_retrain.core import safety
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.store import Store, is_valid_path

# Of a name, on every file system in use; of a whole key, in S3.
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 1024
# A device of Windows, whatever the suffix; and signs that lead elsewhere there.
_OF_WINDOWS = re.compile(r"[\\:]|(?i:^(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$))")
# What a pull puts beside a version's files.
_RESERVED_NAMES = ("manifest.json", "_pulled.json", "current")


def refuse_hostile_list(files: Sequence[File], label: str) -> None:
    """Look at the list of a version's files, before any of them is used as a path.

    Raises:
        IntegrityError: If a path leads outside, can be no file's, is there twice, or is that of another one's folder.
    """
    paths = [file.path for file in files]
    folders = {"/".join(parts[:end]) for parts in (p.split("/") for p in paths) for end in range(1, len(parts))}
    for file in files:
        if fault := _fault(file, folders):
            raise IntegrityError(f"{label}: {file.path[:300]!r}: {fault}; somebody else wrote this manifest")
    names = {*paths, *folders}
    if len(set(paths)) < len(paths) or len({_folded(name) for name in names}) < len(names):
        raise IntegrityError(
            f"{label}: lists a file twice, or under two names that some disks take for one; somebody else wrote this "
            "manifest"
        )


def _folded(path: str) -> str:
    # On most disks of a Mac and of Windows capitals count as small letters, and accents have one form.
    return unicodedata.normalize("NFC", path).casefold()


def _fault(file: File, folders: set[str]) -> str | None:
    if not is_valid_path(file.path):
        return "is no path below a version"
    # What can be printed can be encoded.
    if len(file.path.encode()) > _MAX_PATH_BYTES or max(map(len, file.path.encode().split(b"/"))) > _MAX_NAME_BYTES:
        return "is too long for a file's name"
    if _folded(file.path.partition("/")[0]) in _RESERVED_NAMES:
        return "is a name that this project uses itself"
    if file.path in folders:
        return "is a file and a folder"
    if any(_OF_WINDOWS.search(part) for part in file.path.split("/")):
        return "is no file's name on every system"
    return f"has {file.size_bytes} bytes" if file.size_bytes < 0 else None


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
