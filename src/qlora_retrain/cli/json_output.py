"""The option `--json` of verbs that print one document for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any


def add_json(verb: argparse.ArgumentParser) -> None:
    """Add the option `--json`."""
    verb.add_argument("--json", action="store_true", help="print one JSON document, for programs")


def print_json(document: Any) -> None:
    """Print a document for a program."""
    print(json.dumps(document, indent=1, default=_as_fields))


def _as_fields(value: Any) -> Any:
    """Return an object of ours as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    from qlora_retrain.storage.registry_documents import Release

    # A manifest has no field for its own hash, which `pull --sha256` takes.
    if isinstance(value, Release):
        return value.model_dump() | {"manifest_sha256": value.sha256}
    return value.model_dump() if hasattr(value, "model_dump") else str(value)
