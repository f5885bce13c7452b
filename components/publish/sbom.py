"""Write the software bill of materials of a version, in CycloneDX 1.5: the model, its base, its data and the packages.

It is published, so it holds no URI of the store or of a source. Format: https://cyclonedx.org/docs/1.5/json/
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from components.publish import hub_metadata
from components.publish.facts import VersionFacts
from qlora_retrain.config.publish import PublishConfig
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.storage.pinned_source import PinnedSource

_MODEL, _BASE = "model", "base-model"
# Sources of rows; the base is a model, and published versions are in the recipe.
_DATA = ("raw_data", "eval_data", "golden_data", "replay_data", "reference_data")
_MAX_LICENCE_CHARS = 100  # some packages have the whole text there


def sbom(facts: VersionFacts) -> dict[str, Any]:
    """Return the document."""
    plan = facts.plan
    data = [_data(name, source) for name in _DATA if (source := plan.sources.get(name)) is not None]
    references = [_BASE, *(component["bom-ref"] for component in data)]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        # The same for the same version, so that a retry after a crash writes the same document.
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, f"{plan.line}/{facts.version}").urn,
        "version": 1,
        "metadata": {
            # The format wants RFC 3339's form of a time.
            "timestamp": datetime.strptime(plan.created_at, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).isoformat(),
            "tools": {"components": [{"type": "application", "name": "qlora-retrain"}]},
            "component": _model(facts, [component["bom-ref"] for component in data]),
        },
        "components": [_base(facts), *data, *_packages()],
        "dependencies": [{"ref": _MODEL, "dependsOn": references}],
    }


def _model(facts: VersionFacts, data: list[str]) -> dict[str, Any]:
    """Return the published model, with its measurements."""
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": facts.plan.line,
        "version": facts.version,
        "licenses": [_licence(_licence_name(facts.config))],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "text-generation",
                "datasets": [{"ref": reference} for reference in data],
            },
            "quantitativeAnalysis": {"performanceMetrics": list(_measurements(facts))},
        },
    }


def _measurements(facts: VersionFacts) -> Iterator[dict[str, Any]]:
    numbers = hub_metadata.measured_numbers(facts)
    for name in hub_metadata.metric_names(numbers):
        low, high = (numbers.get(f"{name}_{end}") for end in ("low", "high"))
        interval = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"} if None not in (low, high) else None
        yield {"type": name, "value": f"{numbers[name]:.6g}"} | ({"confidenceInterval": interval} if interval else {})


def _base(facts: VersionFacts) -> dict[str, Any]:
    base, hub = facts.plan.sources["base_model"], facts.base_id
    assert base is not None
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": _BASE,
        "name": hub.repository if hub else "base_model",
        "version": (hub.commit if hub else None) or base.key()[:12],
    }
    if hub:
        commit = f"@{hub.commit}" if hub.commit else ""
        component["purl"] = f"pkg:huggingface/{hub.repository}{commit}"
        component["externalReferences"] = [{"type": "website", "url": hub.page}]
    return component | _files(base)


def _data(name: str, source: PinnedSource) -> dict[str, Any]:
    return {"type": "data", "bom-ref": f"data-{name}", "name": name, "version": source.key()[:12]} | _files(source)


def _files(source: PinnedSource) -> dict[str, Any]:
    """Return the files whose SHA-256 the plan computed, since an ETag or a commit is another kind of pin."""
    files = [
        {
            "type": "file",
            "name": file.path,
            "hashes": [{"alg": "SHA-256", "content": file.pin.removeprefix("sha256:")}],
        }
        for file in source.files
        if file.pin.startswith("sha256:")
    ]
    return {"components": files} if files else {}


def _packages() -> Iterator[dict[str, Any]]:
    # Read from constraints.txt, which also enters the code hash, and not from this environment: publish runs in the
    # light image, where the packages that trained the model are not installed.
    pins = (project_root() / "constraints.txt").read_text()
    packages = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", pins, flags=re.MULTILINE)
    for name, version in sorted(packages, key=lambda package: package[0].lower()):
        purl_name = re.sub(r"[-_.]+", "-", name).lower()
        library = {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{purl_name}@{version}"}
        yield library | _licences(name, version)


def _licences(name: str, version: str) -> dict[str, Any]:
    """Return what a package says of its licence, where it is installed in the pinned version; else nothing."""
    try:
        facts = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return {}

    def field(key: str) -> str:
        return str(facts[key]).strip() if key in facts else ""

    # A build for one kind of device is the same software: torch 2.13.0+cpu.
    if version not in (field("Version"), field("Version").partition("+")[0]):
        return {}
    if expression := field("License-Expression"):
        return {"licenses": [_licence(expression)]}
    text = field("License")
    if not text or "\n" in text or len(text) > _MAX_LICENCE_CHARS:
        classifiers = [c for c in facts.get_all("Classifier") or [] if c.startswith("License ::")]
        text = " / ".join(dict.fromkeys(c.rpartition(" :: ")[2] for c in classifiers))
    return {"licenses": [_licence(text)]} if text else {}


def _licence(text: str) -> dict[str, Any]:
    """Return a licence as SPDX writes it, which programs compare; what SPDX does not know has a name alone."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        return {"expression": str(canonicalize_license_expression(text))}
    except InvalidLicenseExpression:
        return {"license": {"name": text}}


def _licence_name(config: PublishConfig) -> str:
    """Return the licence of the model."""
    if config.licence == "unspecified":
        return "unknown"
    return str(config.licence_name) if config.licence == "other" else config.licence
