"""The form for a run that a person starts: its knobs as JSON schemas, and the changed ones as overrides.

Reads the line's config and builds what Airflow's Params need. Bounds, choices and descriptions come from the config's
models, so the form and the REST API refuse what the plan would refuse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from qlora_retrain.config.line import LineConfig
from qlora_retrain.config.renamed import renamed_to
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes import deadlines
from qlora_retrain.runtimes.airflow.form_fields import (
    DRY_RUN,
    DRY_RUN_SCHEMA,
    KNOB_FIELDS,
    REASON,
    REASON_SCHEMA,
    RESUME_RUN,
    RESUME_RUN_SCHEMA,
)

KNOBS = tuple(KNOB_FIELDS)
# From the form a gate can only be made stricter: whoever may start a run may not say what passes.
_UPPER_LIMITS = ("data.max_quarantined_fraction", "evaluate.max_loss_to_champion")
# The value beside the line's own that is stricter than any.
_STRICTEST: dict[str, Any] = {"evaluate.allow_first_release": False, "publish.promote_to": None}
# The fields that are no knobs of the line.
_OWN_FIELDS = (DRY_RUN, REASON, RESUME_RUN)


def form_fields(config: LineConfig) -> dict[str, tuple[Any, dict[str, Any]]]:
    """List every field of the form as name -> (the line's value, JSON schema)."""
    fields = {knob: (line_value(config, knob), _stricter_schema(config, knob)) for knob in KNOBS}
    # Last the field that is rarely used: it replaces the whole plan.
    return {
        DRY_RUN: (False, DRY_RUN_SCHEMA),
        REASON: (None, REASON_SCHEMA),
        **fields,
        RESUME_RUN: (None, RESUME_RUN_SCHEMA),
    }


def overrides(config: LineConfig, form_values: Mapping[str, Any]) -> list[str]:
    """Return `section.field=value` for every knob that differs from the line's value.

    Raises:
        UsageError: If a name is no field of the form (a typo in a REST call would otherwise be ignored in silence), or
            if a value would weaken a gate of the line, also one that became stricter after the form was shown.
    """
    if unknown := sorted(set(form_values) - {*KNOBS, *_OWN_FIELDS}):
        renamed = "".join(
            f"; {sentence}" for name in unknown if (sentence := renamed_to(name) or renamed_to(name.partition(".")[0]))
        )
        raise UsageError(
            f"{', '.join(unknown)}: not in the form, which has {', '.join((*KNOBS, *_OWN_FIELDS))}; "
            f"change other settings in the line's YAML{renamed}"
        )
    for knob in (*_UPPER_LIMITS, *_STRICTEST):
        own = line_value(config, knob)
        if knob in form_values and _is_weaker(knob, form_values[knob], own):
            raise UsageError(
                f"{knob}={json.dumps(form_values[knob])}: weaker than the line's {json.dumps(own)}; a run by hand can "
                "only make a gate stricter, so change it in the line's YAML"
            )
    # Overrides are read as YAML, and every JSON value is also a YAML value.
    return [
        f"{knob}={json.dumps(form_values[knob])}"
        for knob in KNOBS
        if knob in form_values and form_values[knob] != line_value(config, knob)
    ]


def refuse_other_judgement(run: str, changes: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse to finish a run that would be judged otherwise than the line says now; its training may differ.

    Args:
        run: The run.
        changes: What its plan has otherwise than the line: the name, the plan's value, the line's.

    Raises:
        UsageError: For a setting outside of `train`, unless the form could make it as strict; and for a source.
    """
    for name, value, own in changes:
        is_stricter = name in (*_UPPER_LIMITS, *_STRICTEST) and not _is_weaker(name, value, own)
        if not name.startswith("train.") and not is_stricter:
            raise UsageError(
                f"run {run}: {name} is {json.dumps(value)}, and {json.dumps(own)} in the line now; a run by hand must "
                "be judged as the line says, so start a new one, or finish that one where it was begun"
            )


def _stricter_schema(config: LineConfig, knob: str) -> dict[str, Any]:
    """Return the knob's schema with the line's own value as the weakest."""
    schema, value = knob_schema(knob), line_value(config, knob)
    if knob in _UPPER_LIMITS:
        return {**schema, "maximum": value}
    # The run as a whole has a deadline too, which cannot wait for more.
    if knob == "train.max_hours":
        return {**schema, "maximum": deadlines.max_form_hours(value)}
    if knob in _STRICTEST:
        # Airflow's form shows a list to choose from. The pattern and the type are then superfluous.
        return {**schema, "enum": [value] if value == _STRICTEST[knob] else [value, _STRICTEST[knob]]}
    return schema


def _is_weaker(knob: str, value: Any, line_value: Any) -> bool:
    if knob in _UPPER_LIMITS:
        return not isinstance(value, int | float) or value > line_value
    return bool(value not in (line_value, _STRICTEST[knob]))


def line_value(config: LineConfig, knob: str) -> Any:
    """Return the line's value of the knob, as JSON holds it."""
    section, field = knob.split(".")
    return config.section(section).model_dump(mode="json")[field]


@cache
def knob_schema(knob: str) -> dict[str, Any]:
    """Return the knob's JSON schema, in the flat shape that Airflow's form understands (no `$ref`, no `anyOf`)."""
    # Airflow's form shows one plain input for each field, so references and unions are resolved here.
    section, name = knob.split(".")
    document = _line_schema()
    section_schema = _resolve_refs(document, document["properties"][section])
    flat = _flatten_schema(document, section_schema["properties"][name])
    # The default is the line's own value, which `form_fields` gives; `operational` is a key of ours.
    flat.pop("default", None)
    flat.pop("operational", None)
    field = KNOB_FIELDS[knob]
    # The name of the knob, because the YAML, the plan and the REST API have it.
    return {
        **flat,
        "title": field.title,
        "description": f"{flat['description']} ({knob})",
        "section": field.section,
    }


@cache
def _line_schema() -> dict[str, Any]:
    """Return the JSON schema of a line, which takes long to make, and every task of a run parses the DAG's file."""
    return LineConfig.model_json_schema()


def _resolve_refs(document: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = {**document["$defs"][node["$ref"].rpartition("/")[2]], **{k: v for k, v in node.items() if k != "$ref"}}
    return dict(node)


def _flatten_schema(document: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """Turn `anyOf: [{number, bounds}, {null}]` into `type: [number, null]` with the bounds.

    In JSON schema bounds apply to numbers alone, so the null is still accepted.
    """
    node = _resolve_refs(document, node)
    if "const" in node and node.get("type") == "string":
        # A constant would be asked of numbers beside it too; a pattern is asked of texts alone.
        node["pattern"] = f"^{re.escape(node.pop('const'))}$"
    branches = [_flatten_schema(document, branch) for branch in node.pop("anyOf", [])]
    merged = {key: item for branch in branches for key, item in branch.items() if key != "type"}
    types = [branch["type"] for branch in branches]
    return {**merged, **node, **({"type": types} if types else {})}
