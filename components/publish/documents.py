"""Write the documents of a version: model card, recipe, software bill of materials, licence and cost.

They are published, so none of them may hold a URI of the store or of a source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from components.publish import markdown
from components.publish.facts import VersionFacts
from components.publish.model_card import model_card
from components.publish.sbom import sbom
from qlora_retrain.pipeline.plan import Plan


def documents(facts: VersionFacts) -> dict[str, str]:
    """Return the text of every document, by its path in the version."""
    licence = markdown.inline(markdown.licence_text(facts.config))
    return {
        "README.md": model_card(facts),
        "recipe.json": _as_json(recipe(facts.plan)),
        "sbom.json": _as_json(sbom(facts)),
        "cost.json": _as_json(facts.cost),
        "LICENCE.md": f"The model is published under: {licence}. Its software is listed in `sbom.json`.\n",
    }


def recipe(plan: Plan) -> dict[str, Any]:
    """Return everything that determined the version: identity fields, keys of inputs, code hashes and content pins."""
    return {
        "line": plan.line,
        "steps": {s.name: s.identity for s in plan.steps},
        "inputs": {s.name: s.inputs for s in plan.steps},
        "code": {s.name: s.code for s in plan.steps},
        "sources": {n: {f.path: f.pin for f in p.files} if p else None for n, p in plan.sources.items()},
        "champion": plan.champion.version if plan.champion else None,
        "anchor": plan.anchor.version if plan.anchor else None,
        # Later plans of the line read the start, to pin it again where there is no new data.
        "start": plan.start.model_dump() if plan.start else None,
        "earlier_adapters": [adapter.model_dump() for adapter in plan.earlier_adapters],
    }


def _as_json(document: Mapping[str, Any]) -> str:
    # Other programs read these files, and JSON has no NaN.
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
