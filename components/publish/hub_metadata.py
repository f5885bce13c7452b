"""The front matter of a model card: what the Hugging Face Hub, and programs that read its cards, know of a version.

`huggingface_hub.ModelCard` reads it. The fields: https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from components.publish.facts import Document, VersionFacts
from qlora_retrain.config.publish import PublishConfig
from qlora_retrain.core.licences import HUB_LICENCES

# SPDX says more of these than the Hub's list does.
_HUB_NAMES = {
    "C-UDA-1.0": "c-uda",
    "LGPLLR": "lgpl-lr",
    "ODC-By-1.0": "odc-by",
    "ODbL-1.0": "odbl",
    "PDDL-1.0": "pddl",
}
# Our metrics that the Hub knows by another name, and what a form's numbers hold beside metrics.
_HUB_METRICS = {"macro_f1": "f1"}
_NO_METRICS = ("prompts", "rows", "kl", "agreement", "cost", "size_bytes", "answers_ended")
_LANGUAGE = re.compile(r"[a-z]{2,3}")


def front_matter(facts: VersionFacts) -> str:
    """Return YAML between two lines of `---`."""
    licence = licence_fields(facts.config)
    # Some line breaks within single quotes are read back as spaces.
    style = None if all(map(str.isprintable, licence.values())) else '"'
    return f"---\n{_yaml(licence, style)}{_yaml(dict(_fields(facts)))}---"


def licence_fields(config: PublishConfig) -> dict[str, str]:
    """Return the fields of the licence as the Hub's list has them."""
    link = {"license_link": config.licence_link} if config.licence_link else {}
    if config.licence == "unspecified":
        return {"license": "unknown", **link}
    if config.licence == "other":
        return {"license": "other", "license_name": str(config.licence_name), **link}

    # The Hub names the GNU licences without what SPDX says of later versions.
    base = re.sub(r"^([AL]?GPL-\d\.\d)-(only|or-later)$", r"\1", config.licence)
    name = _HUB_NAMES.get(base, base.lower())
    if name in HUB_LICENCES:
        return {"license": name, **link}
    return {"license": "other", "license_name": config.licence, **link}


def _fields(facts: VersionFacts) -> Iterator[tuple[str, Any]]:
    yield "library_name", "peft" if facts.is_alone else "transformers"
    yield "pipeline_tag", "text-generation"
    if facts.base_id:
        yield "base_model", facts.base_id.repository
        yield "base_model_relation", "adapter" if facts.is_alone else "finetune"
    if languages := [code for code in facts.profile.get("languages") or () if _LANGUAGE.fullmatch(code)]:
        yield "language", languages
    method = facts.train["method"]
    yield "tags", ["qlora-retrain", "full-fine-tuning" if method == "full" else method]
    data = facts.plan.sources["raw_data"]
    if data and data.is_commit:
        yield "datasets", [data.uri.removeprefix("hf://").partition("@")[0]]
    if metrics := list(_metrics(facts)):
        yield "metrics", list(dict.fromkeys(metric["type"] for metric in metrics))
        yield "model-index", [{"name": facts.plan.line, "results": [_result(facts, metrics)]}]


def _result(facts: VersionFacts, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": f"{facts.plan.line}-evaluation", "name": f"evaluation rows of {facts.plan.line}"},
        "metrics": metrics,
    }


def measured_numbers(facts: VersionFacts) -> Document:
    """Return the numbers of the form that ships; where it was not measured, those of the evaluated model."""
    contestants = facts.verdict.get("contestants") or {}
    numbers: Document = facts.shipped_form or contestants.get("challenger") or {}
    return numbers


def metric_names(numbers: Document) -> list[str]:
    """Return the names of the metrics among a form's numbers."""
    return [
        name
        for name, value in numbers.items()
        if name not in _NO_METRICS
        and not name.endswith(("_low", "_high"))
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    ]


def _metrics(facts: VersionFacts) -> Iterator[dict[str, Any]]:
    """Yield the metrics as a card has them, with the interval in the name, since it has no other place."""
    numbers = measured_numbers(facts)
    for name in metric_names(numbers):
        low, high = (numbers.get(f"{name}_{end}") for end in ("low", "high"))
        interval = f" ({facts.confidence:.0%} interval {low:.4g} to {high:.4g})" if None not in (low, high) else ""
        yield {
            "type": _HUB_METRICS.get(name, name), "name": name + interval, "value": float(f"{numbers[name]:.6g}")
        }  # fmt: skip


def _yaml(fields: dict[str, Any], style: str | None = None) -> str:
    # A hub reads UTF-8, and a person reads names more easily than escapes.
    return yaml.safe_dump(
        fields, allow_unicode=True, sort_keys=False, default_flow_style=False, default_style=style, width=10_000
    )
