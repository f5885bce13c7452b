"""A version in the model registry of an MLflow server: a model named like the line, and its alias `production`.

No file is copied: the model version's source is the version's folder in the store, and a run has the numbers. MLflow
gives numbers to versions and knows no conditional writes, so the tag `qlora_retrain.version` says which one is ours.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from qlora_retrain.core import hashing, json_depth
from qlora_retrain.core.aliases import PRODUCTION
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import mirror, registry
from qlora_retrain.storage.mlflow_api import Document, MlflowServer, Refused
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

_PREFIX = "qlora_retrain."
_CERTIFICATE = "evaluation/certificate.json"
_ABSENT, _EXISTS = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"
# As many as MLflow takes at once.
_MAX_METRICS = 1000
_MAX_NAME_CHARACTERS = 250


def mirror_version(store: Store, release: Release, *, is_production: Callable[[], bool]) -> mirror.Mirrored:
    """Make sure that MLflow has a version, and that its alias `production` leads there if the store's does.

    Raises:
        UsageError: If the store is a folder, or the server refuses.
        IntegrityError: If a byte differs from the manifest, or MLflow has something else as this version.
        TryAgain: If the server or the store is busy.
    """
    if not store.uri.startswith("s3:"):
        raise UsageError(f"{store.uri}: MLflow takes no folder of a machine as a version's source; use a store in S3")
    server = MlflowServer()
    with contextlib.closing(server):
        number, is_new = _number_of(server, store, release)
        if is_current := is_production():
            _move_production(server, release.line, number)
    return mirror.Mirrored(release.version, f"models:/{release.line}/{number}", is_new, is_current)


def _number_of(server: MlflowServer, store: Store, release: Release) -> tuple[str, bool]:
    """Return MLflow's number of a version, and whether it was created here."""
    source = f"{store.uri}/{registry.version_folder(release.line, release.version)}"
    tags = _tags(store, release)
    with _accepting(_EXISTS):
        server.post(
            "registered-models/create", {"name": release.line, "tags": _as_list({f"{_PREFIX}line": release.line})}
        )
    if (existing := _find(server, release)) is not None:
        _refuse_other(existing, source, tags)
        return str(existing["version"]), False

    # What MLflow leads to is what was published.
    registry.verify_version(store, release)
    created = server.post(
        "model-versions/create",
        {"name": release.line, "source": source, "run_id": _run_of(server, release, tags), "tags": _as_list(tags)},
    )["model_version"]
    # Another process may have done the same at the same time: both agree on the lower number.
    first = _find(server, release) or created
    if str(first["version"]) != str(created["version"]):
        with _accepting(_ABSENT):
            server.delete("model-versions/delete", {"name": release.line, "version": str(created["version"])})
        _refuse_other(first, source, tags)
    return str(first["version"]), first is created or str(first["version"]) == str(created["version"])


def _find(server: MlflowServer, release: Release) -> Document | None:
    """Return MLflow's version with the tag of this one; of several the first."""
    versions = server.pages("model-versions/search", "model_versions", filter=f"name='{release.line}'")
    named = [v for v in versions if _tags_of(v).get(f"{_PREFIX}version") == release.version]
    return min(named, key=lambda version: int(version["version"]), default=None)


def _refuse_other(existing: Mapping[str, Any], source: str, tags: Mapping[str, str]) -> None:
    name = f"{_PREFIX}manifest_sha256"
    if existing.get("source") != source or _tags_of(existing).get(name) != tags[name]:
        raise IntegrityError(
            f"models:/{existing.get('name')}/{existing.get('version')}: is called {tags[f'{_PREFIX}version']} and has "
            "another source or another manifest than the store; somebody else wrote it: look at it, and delete it"
        )


def _run_of(server: MlflowServer, release: Release, tags: Mapping[str, str]) -> str:
    """Return the id of the run with the version's numbers; one that an interrupted mirror has left is completed."""
    experiment = _experiment(server, release.line)
    query = f"tags.`{_PREFIX}manifest_sha256` = '{release.sha256}'"
    runs = server.post("runs/search", {"experiment_ids": [experiment], "filter": query, "max_results": 1}).get("runs")
    started = _milliseconds(release)
    if runs:
        run_id = str(runs[0]["info"]["run_id"])
    else:
        document = {"experiment_id": experiment, "run_name": release.version, "start_time": started}
        run_id = str(server.post("runs/create", {**document, "tags": _as_list(tags)})["run"]["info"]["run_id"])
    # The same time and values in every try, which MLflow keeps once.
    metrics = [{"key": k, "value": v, "timestamp": started, "step": 0} for k, v in _metrics(release).items()]
    server.post("runs/log-batch", {"run_id": run_id, "metrics": metrics[:_MAX_METRICS]})
    server.post("runs/update", {"run_id": run_id, "status": "FINISHED", "end_time": started})
    return run_id


def _experiment(server: MlflowServer, name: str) -> str:
    with _accepting(_EXISTS):
        return str(server.post("experiments/create", {"name": name})["experiment_id"])
    answer = server.get("experiments/get-by-name", experiment_name=name)
    return str(answer["experiment"]["experiment_id"])


def _move_production(server: MlflowServer, line: str, number: str) -> None:
    current = None
    with _accepting(_ABSENT, "INVALID_PARAMETER_VALUE"):
        current = server.get("registered-models/alias", name=line, alias=PRODUCTION)["model_version"]["version"]
    if str(current) != number:
        server.post("registered-models/alias", {"name": line, "alias": PRODUCTION, "version": number})


def _tags(store: Store, release: Release) -> dict[str, str]:
    tags = {
        "version": release.version,
        "manifest_sha256": release.sha256,
        "content_hash": release.content_hash,
        "verdict": _verdict(store, release),
        "run": str(release.provenance.get("run_id", "")),
    }
    return {f"{_PREFIX}{name}": text for name, text in tags.items() if text}


def _verdict(store: Store, release: Release) -> str:
    """Return the verdict on what ships, from the version's certificate."""
    file = next((file for file in release.files if file.path == _CERTIFICATE), None)
    if file is None:
        return ""
    data = store.read(f"{registry.version_folder(release.line, release.version)}/{file.path}").data
    if hashing.sha256_bytes(data) != file.sha256:
        raise IntegrityError(f"{store.uri}: {release.version}/{file.path}: its sha256 differs from the manifest's")
    document = json_depth.loads(data)
    return str(document.get("verdict", "")) if isinstance(document, dict) else ""


def _metrics(release: Release) -> dict[str, float]:
    """Return the numbers of a version's steps, as `artifact.number`."""
    return {
        f"{artifact}.{name}"[:_MAX_NAME_CHARACTERS]: float(value)
        for artifact, numbers in sorted(release.numbers.items())
        for name, value in (numbers.items() if isinstance(numbers, dict) else ())
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _milliseconds(release: Release) -> int:
    return int(datetime.fromisoformat(release.created_at).timestamp() * 1000)


def _as_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in tags.items()]


def _tags_of(version: Mapping[str, Any]) -> dict[str, str]:
    entries: Iterable[Mapping[str, Any]] = version.get("tags") or ()
    return {str(entry.get("key")): str(entry.get("value")) for entry in entries}


@contextlib.contextmanager
def _accepting(*codes: str) -> Iterator[None]:
    """Go on behind the block where the server refuses for one of these reasons."""
    try:
        yield
    except Refused as refused:
        if refused.code not in codes:
            raise
