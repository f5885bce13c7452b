"""The form of a hand-started run: which knobs a person may turn, as JSON schema, and what they turned as overrides.

Reads the line's config; makes what Airflow's Params need. Bounds, choices and explanations are those of the config's
own models, so the form and the REST API refuse what the plan would refuse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from qlora_retrain.config.line import LineConfig
from qlora_retrain.core.errors import UsageError

KNOBS = (
    "train.learning_rate",
    "train.rank",
    "train.epochs",
    "train.max_steps",
    "train.batch_size",
    "train.max_hours",
    "data.max_quarantined",
    "evaluate.first_release",
    "evaluate.max_loss_to_champion",
    "publish.promote_to",
)
PLAN_URI = "plan_uri"
_PLAN_URI_SCHEMA = {
    "type": ["null", "string"],
    # No user info, no query: a URI never carries a secret.
    "pattern": r"^(file:///|s3://)[A-Za-z0-9._/~%+=-]+/plan\.json$",
    "title": PLAN_URI,
    "description": "finish the plan of another run (…/runs/<run id>/plan.json); every other field is then unused",
    "section": "Resume",
}


def fields(config: LineConfig) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every field of the form as name -> (the line's value, JSON schema)."""
    found = {path: (value(config, path), schema(path)) for path in KNOBS}
    return {**found, PLAN_URI: (None, _PLAN_URI_SCHEMA)}


def overrides(config: LineConfig, filled: Mapping[str, Any]) -> list[str]:
    """`section.field=value` for every knob that was turned away from the line's value.

    Raises:
        UsageError: If a name is no field of the form: who triggers by REST would believe that it was heeded.
    """
    if unknown := sorted(set(filled) - {*KNOBS, PLAN_URI}):
        raise UsageError(
            f"{', '.join(unknown)}: not in the form, which has {', '.join((*KNOBS, PLAN_URI))}; "
            "all else is changed in the line's YAML"
        )
    return [f"{p}={json.dumps(filled[p])}" for p in KNOBS if p in filled and filled[p] != value(config, p)]


def value(config: LineConfig, path: str) -> Any:
    """The line's value of the knob, as JSON holds it."""
    section, name = path.split(".")
    return config.section(section).model_dump(mode="json")[name]


@cache
def schema(path: str) -> dict[str, Any]:
    """The knob's JSON schema, in the flat shape that Airflow's form understands (no `$ref`, no `anyOf`)."""
    section, name = path.split(".")
    document = LineConfig.model_json_schema()
    model = _resolved(document, document["properties"][section])
    flat = _flat(document, model["properties"][name])
    flat.pop("default", None)
    flat.pop("operational", None)
    return {**flat, "title": path, "section": section.capitalize()}


def _resolved(document: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = {**document["$defs"][node["$ref"].rpartition("/")[2]], **{k: v for k, v in node.items() if k != "$ref"}}
    return dict(node)


def _flat(document: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """`anyOf: [{number, bounds}, {null}]` as `type: [number, null]` with the bounds, which bind numbers only."""
    node = _resolved(document, node)
    branches = [_flat(document, branch) for branch in node.pop("anyOf", [])]
    merged = {key: item for branch in branches for key, item in branch.items() if key != "type"}
    types = [branch["type"] for branch in branches]
    return {**merged, **node, **({"type": types} if types else {})}
