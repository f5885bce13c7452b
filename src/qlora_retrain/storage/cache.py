"""The node cache: inputs as read-only folders on this machine, each file checked by hash at every use.

Pods may share it over a network, so a step's own files, which are larger and read by nobody else, can go elsewhere.

Environment: `QLORA_RETRAIN_CACHE`, the cache's folder; `QLORA_RETRAIN_WORK`, that of steps at work, else `work` in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora_retrain.core import hashing
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.storage.artifact import File


def home() -> Path:
    """The cache's folder: `QLORA_RETRAIN_CACHE`, else the user's cache folder."""
    configured = os.environ.get("QLORA_RETRAIN_CACHE")
    return Path(configured) if configured else Path("~/.cache/qlora-retrain").expanduser()


def fetch(name: str, key: str, download: Callable[[Path], None], files: tuple[File, ...] | None) -> Path:
    """A local folder with the content `key`.

    Args:
        name: The input's name, a folder of the cache.
        key: Its content's address.
        download: Fills an empty folder; it is called where the cache has nothing, or something broken.
        files: What must be there, by hash; None where `download` itself checks and the first use records it.

    Raises:
        IntegrityError: If a fresh download is not what `files` promises.
    """
    target = home() / name / key
    if target.is_dir():
        if _fault(target, files, target) is None:
            return target
        _remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _folder_in(home() / "work") as work:  # the cache's own disk: a rename puts it in its place
        temporary = work / name
        temporary.mkdir()
        download(temporary)
        if files is None:
            _record(temporary, target)
        fault = _fault(temporary, files, target)
        if fault is not None:
            raise IntegrityError(f"{name}: {fault}")
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o444)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first; its folder has the same content
                raise
    return target


def _fault(folder: Path, files: tuple[File, ...] | None, target: Path) -> str | None:
    """What is wrong with a folder, or None."""
    if files is None:
        try:
            lines = _record_of(target).read_text().splitlines()
        except OSError:
            return "its record is missing"
        wanted = [(line[65:], line[:64]) for line in lines]
    else:
        wanted = [(f.path, f.sha256) for f in files]
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    if extra := sorted(there - {path for path, _ in wanted}):
        return f"{extra[0]}: does not belong here"
    for path, sha256 in wanted:
        try:
            found = hashing.sha256_file(folder / path)
        except OSError as error:
            return f"{path}: {error.strerror}"
        if found != sha256:
            return f"{path}: wanted sha256 {sha256[:12]}, found {found[:12]}"
    return None


def _record_of(target: Path) -> Path:
    """Beside the folder, so that a step sees its input's files and nothing else."""
    return target.with_name(f"{target.name}.sha256")


def _record(folder: Path, target: Path) -> None:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    text = "".join(f"{hashing.sha256_file(p)} {p.relative_to(folder).as_posix()}\n" for p in paths)
    temporary = _record_of(folder)  # in the work folder: it goes with it
    temporary.write_text(text)
    temporary.replace(_record_of(target))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def work_folder() -> contextlib.AbstractContextManager[Path]:
    """An empty folder for what a step writes: its output, its checkpoints."""
    configured = os.environ.get("QLORA_RETRAIN_WORK")
    return _folder_in(Path(configured) if configured else home() / "work")


@contextlib.contextmanager
def _folder_in(parent: Path) -> Iterator[Path]:
    """An empty folder that goes with the block; folders of processes that died are removed first."""
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob("*.lock"):
        # Another process may remove it, lock it or own it meanwhile: then it is not ours to clean.
        with contextlib.suppress(OSError), stale.open("rb+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(stale.with_suffix(""))
            stale.unlink(missing_ok=True)
    mine = parent / uuid.uuid4().hex[:12]
    lock = mine.with_suffix(".lock")
    with lock.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        mine.mkdir()
        try:
            yield mine
        finally:
            _remove(mine)
            lock.unlink(missing_ok=True)
