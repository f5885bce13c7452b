"""The key of a recipe: a hash of what determined a version's model, without what judged it.

Two runs of one recipe may give other bytes, since a retraining need not repeat itself. So a rejection holds for the
recipe's key as well as for the content. The champion, the rules and the rows of the gates are no part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_retrain.core import graph, hashing, json_depth
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import verified_files, versions
from qlora_retrain.storage.registry_documents import Release
from qlora_retrain.storage.store import Store

PATH = "recipe.json"
# What the step that makes the model reads beside these, such as the evaluation, only judges. The key of the adapter
# stands for the data, the base's weights and the code and settings of every step before.
_INPUTS = ("adapter", "base_model", graph.EARLIER_ADAPTERS)


def key_of(recipe: Mapping[str, Any]) -> str | None:
    """Return the key of a recipe; None for a document that does not say what determined its version.

    Args:
        recipe: The fields of `recipe.json`: `steps`, `inputs` and `code`, each by the step's name.
    """
    step = graph.producer_name("model")
    tables = (recipe.get("steps"), recipe.get("inputs"), recipe.get("code"))
    identity, inputs, code = (table.get(step) if isinstance(table, dict) else None for table in tables)
    if identity is None or code is None or not isinstance(inputs, dict) or "adapter" not in inputs:
        return None
    return hashing.sha256_json({"config": identity, "code": code, "inputs": {n: inputs.get(n) for n in _INPUTS}})


def read(store: Store, release: Release) -> Mapping[str, Any]:
    """Return a version's recipe; an empty one where it has none that can be read."""
    file = verified_files.find_file(release.files, PATH)
    if file is None:
        return {}
    try:
        folder = versions.version_folder(release.line, release.version)
        document = json_depth.loads(verified_files.read_verified(store, folder, file))
    except (IntegrityError, UsageError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def key_of_version(store: Store, release: Release) -> str | None:
    """Return the key of a version's recipe, or None where it states none."""
    return key_of(read(store, release))
