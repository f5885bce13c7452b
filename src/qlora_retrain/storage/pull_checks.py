"""What a pull refuses before it downloads: another key, another manifest, an alias that went back in time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import keys
from qlora_retrain.storage.registry_documents import Release
from qlora_retrain.storage.signatures import Signed

_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class PullOptions:
    """What the caller of a pull accepts; `pull.pull` explains each."""

    min_generation: int
    verify_key: str | None
    sha256: str | None

    def __post_init__(self) -> None:
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise UsageError(f"--sha256 {self.sha256}: expected 64 hex digits in small letters, as `pull` prints them")


def fingerprint_of(document: Signed) -> str | None:
    """Return the fingerprint of the key that signed a document; None where nobody did."""
    return keys.fingerprint(document.signer) if document.signer else None


def is_version_name(name: str) -> bool:
    """Return whether a version may have that name, so that it can be a part of a path."""
    return bool(_VERSION.fullmatch(name))


def check(
    reference: str,
    release: Release,
    record: Mapping[str, Any],
    previous: Mapping[str, Any],
    options: PullOptions,
    destination: Path,
) -> None:
    """Compare what a reference names with what the caller accepts, and with what earlier pulls recorded.

    Args:
        reference: What is pulled.
        release: The version that it names.
        record: What `pull.resolve` says of it.
        previous: The record of earlier pulls into the same folder.
        options: What the caller accepts.
        destination: The folder, for messages.

    Raises:
        UsageError: If a lowest generation is given for a version, or the folder holds another line.
        IntegrityError: If one of them differs.
    """
    if options.min_generation and record["alias"] is None:
        raise UsageError(f"{reference}: a version has no generation; --min-generation is for an alias")
    line = previous.get("line", release.line)
    if line != release.line:
        raise UsageError(
            f"{reference}: {destination} holds {line} {previous['version']}, and whoever reads there would get another "
            f"line's model; pull {release.line} into a folder of its own, or empty {destination} first"
        )
    if record["generation"] < options.min_generation:
        raise IntegrityError(
            f"{reference}: expected generation {options.min_generation} or a later one, found {record['generation']} "
            f"with {release.version}; this store is an old copy, or was tampered with"
        )
    _refuse_other_signer(reference, record, options.verify_key, previous)
    _refuse_other_manifest(reference, release, previous, options.sha256, destination)

    generation, version = previous.get("seen", {}).get(reference, (0, None))
    # One generation is one move of the alias, so it can never name two versions either.
    if record["generation"] < generation or (
        record["generation"] == generation and version not in (None, release.version)
    ):
        raise IntegrityError(
            f"{reference}: generation {record['generation']} with {release.version} does not follow generation "
            f"{generation} with {version}, pulled before into {destination}; this store is an old copy, or was "
            "tampered with"
        )


def remember(
    reference: str, release: Release, record: Mapping[str, Any], previous: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the record of a pull with what the earlier ones found: signers, generations and manifests."""
    return {
        **record,
        "signers": previous.get("signers", {}) | ({record["line"]: record["signer"]} if record["signer"] else {}),
        "seen": {**previous.get("seen", {}), reference: (record["generation"], release.version)},
        "manifests": _manifests(previous) | {_name(release): release.sha256},
    }


def _manifests(previous: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of the manifest of each version that was pulled before."""
    # An earlier release of this code recorded the last one alone.
    last = {f"{previous.get('line')} {previous.get('version')}": previous.get("manifest_sha256")}
    manifests: dict[str, str] = previous.get("manifests", last if "manifest_sha256" in previous else {})
    return manifests


def _name(release: Release) -> str:
    return f"{release.line} {release.version}"


def _refuse_other_manifest(
    reference: str, release: Release, previous: Mapping[str, Any], sha256: str | None, destination: Path
) -> None:
    """Refuse another manifest than the caller names, or than an earlier pull of the same version found."""
    expected = sha256 or _manifests(previous).get(_name(release))
    if expected in (None, release.sha256):
        return
    where = "--sha256 says" if sha256 else f"an earlier pull into {destination} says"
    raise IntegrityError(
        f"{reference}: expected {release.version} with a manifest whose sha256 is {expected}, as {where}, found "
        f"{release.sha256}; a manifest is written once, so somebody else changed it: ask the publisher for the right "
        "hash and pull with --sha256"
    )


def _refuse_other_signer(
    reference: str, record: Mapping[str, Any], verify_key: str | None, previous: Mapping[str, Any]
) -> None:
    """Refuse what another key signed than the one that the caller gives, or that an earlier pull recorded."""
    expected = verify_key or previous.get("signers", {}).get(record["line"])
    if expected in (None, record["signer"]):
        return
    actual = f"a signature by {record['signer']}" if record["signer"] else "no valid signature"
    where = "--verify-key" if verify_key else "an earlier pull"
    raise IntegrityError(
        f"{reference}: expected a signature by {expected}, as {where} says, found {actual}; if the publisher replaced "
        "the key, get the new one's fingerprint from them and pull with --verify-key"
    )
