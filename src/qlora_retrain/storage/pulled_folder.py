"""The destination of a pull: several versions beside each other, of which one is current.

DEST/.pulled/<version>-<hash>.<letter>/   a version: manifest.json, the files, and the record of the pull
DEST/current -> .pulled/...               moves from one whole version to another in one step
DEST/model -> current/model, ...          every name of the current version, where earlier releases had the files
DEST/.pulled/lock, *.reading              held by who pulls, and by who reads a version

Nothing outside of DEST is touched, so DEST may be a mount point, or a folder in a parent that belongs to somebody else.
A process that is killed leaves folders in `.pulled` that are not current: the next pull goes on in them, links what is
unchanged from them, and removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import string
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage import plain_files
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.atomic_files import destination_errors, disk_errors, link_or_copy
from qlora_retrain.storage.pulled_record import listed_files, read_record

# In every version's folder: what was pulled, and the newest generation of every reference pulled into DEST.
RECORD = "_pulled.json"
MANIFEST = "manifest.json"
CURRENT = "current"
_INNER = ".pulled"
_LOCK = "lock"
_SLOT = re.compile(r"\.pulled/([0-9A-Za-z][0-9A-Za-z._-]*)")
# A file system's own, at the top of a mount point.
_OF_FILE_SYSTEM = ("lost+found",)


class PulledFolder:
    """The destination of pulls.

    Args:
        destination: A folder, or what will be one; a link to a folder stands for that folder.
    """

    def __init__(self, destination: Path) -> None:
        # In a working directory that was removed, no relative path leads anywhere.
        with destination_errors(destination):
            self.path = Path(os.path.realpath(destination))
        self._inner = self.path / _INNER
        self._is_new = False
        with disk_errors(self.path):
            if self.path.is_symlink():
                raise UsageError(f"{destination}: is a link that leads back to itself; choose another folder")

    def current(self) -> Path | None:
        """Return the folder of the current version; None where there is none."""
        try:
            match = _SLOT.fullmatch(str((self.path / CURRENT).readlink()))
        except OSError:
            return None
        folder = self._inner / match[1] if match else None
        return folder if folder is not None and folder.is_dir() and not folder.is_symlink() else None

    def record(self) -> dict[str, Any]:
        """Return the record of the last pull; empty where there was none.

        Raises:
            UsageError: If the folder holds something that no pull made.
        """
        with disk_errors(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise UsageError(f"{self.path}: expected a folder, found a file, and no pull made it; choose a folder")
            names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        # What a first pull leaves when it is killed, or when somebody removed the versions to make room.
        current = self.current()
        if current is None and all(n in (_INNER, *_OF_FILE_SYSTEM) or self._is_dangling(n) for n in names):
            return {}
        try:
            return read_record((current or self.path) / RECORD)
        except (OSError, ValueError) as error:
            if current is None:
                raise UsageError(f"{self.path}: is not empty and no pull made it; choose another folder") from error
            hint = "an empty folder remembers nothing, so pull with --verify-key and --min-generation"
            text = f"{current / RECORD}: expected the record of a pull, and cannot read it; empty {self.path}; {hint}"
            raise UsageError(text) from error

    def _is_dangling(self, name: str) -> bool:
        path = self.path / name
        return path.is_symlink() and not path.exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait for the pulls that other processes make into this folder, and keep further ones waiting."""
        with destination_errors(self.path):
            self._is_new = not self.path.exists()
            handle = self._lock()
        try:
            yield
        finally:
            os.close(handle)  # which releases the lock

    def _lock(self) -> int:
        while True:
            # What lies where it leads to would be removed with the versions that are not current.
            if self._inner.is_symlink():
                raise UsageError(f"{self._inner}: is a link, and no pull made it: remove it")
            self._inner.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                # With the rights of the umask, since several users of a group may pull into one folder.
                handle = os.open(self._inner / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"another pull into {self.path} is under way: this one waits", file=sys.stderr, flush=True)
                    fcntl.flock(handle, fcntl.LOCK_EX)
                # A pull that failed may have removed the file meanwhile: then the lock is none.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), (self._inner / _LOCK).stat()):
                        return handle
                os.close(handle)

    def adopt_flat_layout(self) -> None:
        """Turn what an earlier release pulled, whose files lie in DEST itself, into a version's folder."""
        if not (self.path / RECORD).is_file() or (self.path / RECORD).is_symlink():
            return
        folder = self._inner / "earlier"
        folder.mkdir(exist_ok=True)
        names = sorted(
            {MANIFEST, *(file.path.partition("/")[0] for file in listed_files(self.path / MANIFEST))} - {RECORD}
        )
        for name in names:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                path.rename(folder / name)
            elif path.is_file() and not path.is_symlink():
                _link_anew(path, folder / name)
            # Not through `current`, which will name this folder when it is whole.
            if (folder / name).exists():
                self._link(name, f"{_INNER}/{folder.name}/{name}")
        _link_anew(self.path / RECORD, folder / RECORD)
        self.make_current(folder)
        # The record comes last: while it is a plain file, a pull that was killed here is repeated.
        for name in (*(name for name in names if (folder / name).exists()), RECORD):
            self._link(name, f"{CURRENT}/{name}")

    def refuse_obstacles(self, names: Collection[str]) -> None:
        """Refuse to replace what no pull made. A link is none of that: whoever put one there loses nothing.

        Raises:
            UsageError: If a file or a folder has the place of a name of the version.
        """
        for name in (*names, RECORD, CURRENT):
            path = self.path / name
            if os.path.lexists(path) and not path.is_symlink():
                raise UsageError(f"{path}: is in the way, and no pull made it; move it away, or choose another folder")

    def new_version(self, label: str, files: Collection[File]) -> Path:
        """Return a folder in which a version can be assembled, with what an interrupted pull left of it.

        Args:
            label: Names the version and the chosen files, so that the same pull goes on in the same folder.
            files: The files that the folder may hold.
        """
        for letter in string.ascii_lowercase:
            folder = self._inner / f"{label}.{letter}"
            # The current folder may be damaged; it stays as it is until the new one is whole.
            if folder != self.current() and not self._is_read(folder):
                break
        if os.path.lexists(folder) and plain_files.first_foreign(folder, {RECORD, *(file.path for file in files)}):
            plain_files.remove(folder)
        folder.mkdir(exist_ok=True)
        self._reuse(folder, files)
        return folder

    def _reuse(self, folder: Path, files: Collection[File]) -> None:
        """Link the files that another version has too, by what its manifest says; whoever uses them hashes them."""
        versions = [path for path in sorted(self._inner.iterdir()) if path != folder and path.is_dir()]
        sources = {
            (file.sha256, file.size_bytes): version / file.path
            for version in versions
            for file in listed_files(version / MANIFEST)
        }
        for file in files:
            source, target = sources.get((file.sha256, file.size_bytes)), folder / file.path
            if source is None or target.exists() or source.is_symlink() or not source.is_file():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(source, target)

    def write_record(self, folder: Path, record: dict[str, Any]) -> None:
        """Write the record of a version's folder in one step."""
        temporary = self._inner / "record"
        temporary.unlink(missing_ok=True)
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(folder / RECORD)

    def make_current(self, folder: Path) -> None:
        """Let `current` name a version's folder, in one step."""
        # Readers may not be allowed to make it.
        _reading_file(folder).touch()
        self._link(CURRENT, f"{_INNER}/{folder.name}")

    def tidy(self) -> None:
        """Give every name of the current version its link; remove other links, and versions that nobody reads."""
        current = self.current()
        assert current is not None, "no version was made current"
        names = {path.name for path in current.iterdir()}
        for name in sorted(names):
            self._link(name, f"{CURRENT}/{name}")
        for path in list(self.path.iterdir()):
            if path.name not in names and _leads_to(path, f"{CURRENT}/{path.name}"):
                path.unlink()
        for path in sorted(self._inner.iterdir()):
            if path.is_dir() and path != current and not self._is_read(path):
                plain_files.remove(path)
        for path in self._inner.glob("*.reading"):
            if not path.with_suffix("").exists():
                path.unlink(missing_ok=True)

    def discard(self, folder: Path | None) -> None:
        """Remove a folder in which no version could be assembled, and DEST where this pull made it for nothing."""
        if folder is not None:
            plain_files.remove(folder)
        if os.path.lexists(self.path / CURRENT):
            return
        with contextlib.suppress(OSError):  # what an interrupted pull has so far is there, or another pull has begun
            if [path.name for path in self._inner.iterdir()] == [_LOCK]:
                (self._inner / _LOCK).unlink()
            self._inner.rmdir()
            if self._is_new:
                self.path.rmdir()

    def _is_read(self, folder: Path) -> bool:
        try:
            with _reading_file(folder).open("rb+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:  # somebody holds it; or it belongs to another user, and so does the version
            return True
        return False

    def _link(self, name: str, target: str) -> None:
        """Let DEST/name be a link to the target, in one step, unless it is that already."""
        path, temporary = self.path / name, self._inner / "link"
        if _leads_to(path, target):
            return
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(target)
        except PermissionError as error:
            if error.errno != errno.EPERM:
                raise
            # This folder may be written to, so it is the answer of a file system without links, such as FAT.
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(temporary)) from error
        temporary.replace(path)


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[Path]:
    """Yield the current version's folder below the destination of a pull; no pull removes it until the block ends.

    Any other folder is yielded as it is.
    """
    destination = PulledFolder(folder)
    while (current := destination.current()) is not None:
        try:
            stream = _reading_file(current).open("rb")
        except OSError:  # an earlier release's version, or a file system that this user may not read there
            yield current
            return
        with stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            # It may have been removed before the lock was there.
            if destination.current() == current:
                yield current
                return
    yield folder


def _leads_to(path: Path, target: str) -> bool:
    return path.is_symlink() and str(path.readlink()) == target


def _link_anew(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    link_or_copy(source, target)


def _reading_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.reading")
