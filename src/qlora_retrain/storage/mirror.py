"""Copy a published version to another registry: to a repository of the Hugging Face Hub, or to MLflow.

The store stays what counts. A mirror gets exactly what the store's signed manifest lists, under the version's own name;
a second call finds what is there and compares it. Nothing is written to the store.

Command: `qlora-retrain mirror LINE VERSION --to hf://owner/name --root URI`
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qlora_retrain.config import mirrors
from qlora_retrain.core import hashing, safety
from qlora_retrain.core.aliases import PRODUCTION
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import pull, registry, version_parts
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import NotFound, Store

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Mirrored:
    """A version in another registry.

    Attributes:
        version: The version.
        place: Where it is there, for a person.
        is_new: Whether this call has put it there.
        is_production: Whether the mirror's own name for production leads to it now.
    """

    version: str
    place: str
    is_new: bool
    is_production: bool


def mirror(store: Store, line: str, name: str, destination: str) -> Mirrored:
    """Make sure that a mirror has a version, and that its production is the one that the store names.

    Args:
        store: The store.
        line: The line.
        name: A version, or an alias.
        destination: `hf://owner/name`, or `mlflow`.

    Raises:
        UsageError: If there is no such version or destination, or no access to it.
        IntegrityError: If the store's bytes are not what was published, or the mirror has other bytes by that name.
        TryAgain: If the mirror or the store is busy, or another process mirrors at the same time.
    """
    if not re.fullmatch(mirrors.PATTERN, destination):
        raise UsageError(f"--to {destination}: expected {mirrors.HUB_SCHEME}owner/name, or {mirrors.MLFLOW}")
    release, _ = pull.resolve(store, f"{line}@{name}")
    label = f"{line} {release.version}"
    safety.refuse_foreign((file.path for file in release.files), label)
    version_parts.refuse_other_content(release, label)

    def is_production() -> bool:
        alias, _ = registry.read_alias(store, line, PRODUCTION)
        return alias is not None and (alias.version, alias.manifest_sha256) == (release.version, release.sha256)

    # A damaged alias is refused before anything is sent. It is read again after that, since an upload takes hours and
    # somebody may roll back meanwhile.
    is_production()

    if destination == mirrors.MLFLOW:
        from qlora_retrain.storage import mlflow_mirror

        return mlflow_mirror.mirror_version(store, release, is_production=is_production)
    from qlora_retrain.storage import hub_mirror

    repository = destination.removeprefix(mirrors.HUB_SCHEME)
    return hub_mirror.mirror_version(store, release, repository, is_production=is_production)


def files_with_manifest(store: Store, release: Release) -> tuple[File, ...]:
    """Return the files of a version and its manifest, by which whoever gets them from a mirror can check them.

    Raises:
        IntegrityError: If another manifest is in the store by now.
    """
    path = f"{registry.version_folder(release.line, release.version)}/{MANIFEST}"
    try:
        data = store.read(path).data
    except NotFound:
        data = b""
    if hashing.sha256_bytes(data) != release.sha256:
        raise IntegrityError(f"{store.uri}/{path}: was changed while it was being mirrored; mirror it again")
    return (*release.files, File(path=MANIFEST, size_bytes=len(data), sha256=release.sha256))
