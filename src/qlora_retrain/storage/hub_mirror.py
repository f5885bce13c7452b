"""A version in a repository of the Hugging Face Hub: the tag VERSION, and `main` for what production names.

The files go to a branch of their own, are compared there with the store's manifest, and then get their tag. So a tag
names a verified version, whenever a mirror dies; nobody who reads `main` or a tag sees a version half there. `main`
follows production: it gets the tag's files by a second commit, which uploads nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_retrain.core.errors import Cause, IntegrityError, TryAgain, UsageError
from qlora_retrain.storage import cache, mirror, range_download, registry
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.hub_client import HubRepository, RemoteFile
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

if TYPE_CHECKING:
    from qlora_retrain.storage.hub_client import Operation

_MAIN = "main"
# The Hub's own: which files of the repository are large ones.
_ATTRIBUTES = ".gitattributes"
_CHUNK_BYTES = 2**20


def mirror_version(
    store: Store, release: Release, repository: str, *, is_production: Callable[[], bool]
) -> mirror.Mirrored:
    """Make sure that a repository has a version under its tag, and in `main` if production names it.

    Raises:
        UsageError: If there is no such repository, or no right to write to it.
        IntegrityError: If the tag has other files, or the Hub has got other bytes.
        TryAgain: If the Hub or the store is busy, or somebody else writes to the repository.
    """
    hub = HubRepository(repository)
    files = mirror.files_with_manifest(store, release)
    refs, branch = hub.refs(), f"mirror-{release.version}"
    if _MAIN not in refs.branches:
        raise UsageError(f"hf://{repository}: has no branch {_MAIN}; create the repository anew, with a first commit")

    commit = refs.tags.get(release.version)
    if commit is None:
        commit = _upload(store, release, hub, files, branch)
        hub.delete_branch(branch)
    else:
        _compare_with_store(store, release, hub, files, commit)
        # Of a mirror that died after it had created the tag.
        if branch in refs.branches:
            hub.delete_branch(branch)
    if is_current := is_production():
        _move_main(hub, release, commit)
    return mirror.Mirrored(
        release.version, f"{hub.url}/tree/{release.version}", release.version not in refs.tags, is_current
    )


def _upload(store: Store, release: Release, hub: HubRepository, files: tuple[File, ...], branch: str) -> str:
    """Commit a version's files to a branch, compare what the Hub has then, and tag it; return the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    hub.create_branch(branch)
    parent = hub.refs().branches.get(branch)
    if parent is None:
        raise TryAgain(f"hf://{hub.name}: another process mirrors {release.version}", cause=Cause.CONFLICT)
    paths = {file.path for file in files}
    with cache.work_folder() as folder:
        # Compared with the manifest as they come, so nothing else is uploaded.
        range_download.download(store, registry.version_folder(release.line, release.version), files, folder)
        operations: list[Operation] = [
            *(CommitOperationAdd(file.path, folder / file.path) for file in files),
            *(CommitOperationDelete(path) for path in sorted(_foreign(hub.files(parent), paths))),
        ]
        commit = hub.commit(operations, branch, parent, _title(release))
        _refuse_difference(hub, release, files, hub.files(commit), folder)
    hub.create_tag(release.version, commit)
    return commit


def _compare_with_store(
    store: Store, release: Release, hub: HubRepository, files: tuple[File, ...], commit: str
) -> None:
    """Refuse a tag that names other files than the store's version; large ones are compared by their hash."""
    remote = hub.files(commit)
    small = [file for file in files if file.path in remote and remote[file.path].sha256 is None]
    with cache.work_folder() as folder:
        range_download.download(store, registry.version_folder(release.line, release.version), small, folder)
        _refuse_difference(hub, release, files, remote, folder)


def _refuse_difference(
    hub: HubRepository, release: Release, files: tuple[File, ...], remote: Mapping[str, RemoteFile], folder: Path
) -> None:
    fault = next((f"{file.path}: {text}" for file in files if (text := _fault(file, remote, folder))), None)
    if fault is None and (foreign := sorted(_foreign(remote, {file.path for file in files}))):
        fault = f"{foreign[0]}: is no file of the version"
    if fault:
        raise IntegrityError(
            f"hf://{hub.name}@{release.version}: {fault[:400]}; somebody else wrote it, or the repository leaves files "
            "out (.gitignore). Look at it, delete that tag, and mirror the version again"
        )


def _fault(file: File, remote: Mapping[str, RemoteFile], folder: Path) -> str | None:
    """Return how the Hub's file differs from the manifest's; None where it does not."""
    if (entry := remote.get(file.path)) is None:
        return "missing"
    # Of a small file the Hub has Git's id alone.
    is_same = entry.sha256 == file.sha256 if entry.sha256 else entry.blob_id == _git_id(folder / file.path)
    return None if is_same else "has other bytes than in the store"


def _git_id(path: Path) -> str:
    """Return the id that Git gives to a file."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _move_main(hub: HubRepository, release: Release, commit: str) -> None:
    """Let `main` have exactly the files of a commit."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    parent = hub.refs().branches[_MAIN]
    target, current = _own(hub.files(commit)), _own(hub.files(parent))
    if target == current:
        return
    operations: list[Operation] = [
        *(
            CommitOperationCopy(path, path, src_revision=commit)
            for path, file in target.items()
            if current.get(path) != file
        ),
        *(CommitOperationDelete(path) for path in sorted(_foreign(current, target))),
    ]
    moved = hub.commit(operations, _MAIN, parent, _title(release))
    if _own(hub.files(moved)) != target:
        raise IntegrityError(
            f"hf://{hub.name}: the files of {_MAIN} are not those of its tag {release.version} after they were copied; "
            "somebody else writes to the repository"
        )


def _own(remote: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    return {path: file for path, file in remote.items() if path != _ATTRIBUTES}


def _foreign(remote: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Return the paths of a commit that are no file of the version."""
    return set(remote) - set(paths) - {_ATTRIBUTES}


def _title(release: Release) -> str:
    return f"{release.line} {release.version}"
