"""What differs between two versions of a line: data, recipe, base, code, and the metrics with their intervals.

Reads what the versions say of themselves (`manifest.json`, `recipe.json`, `evaluation/evaluation.json`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_retrain.pipeline.version_summary import (
    EVALUATION,
    Document,
    Measurement,
    contestants,
    measurement,
    read_document,
)
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

RECIPE = "recipe.json"
_ABSENT = "-"
# What the data gate counted, and how long it took, which says nothing of the data.
_DATA = "dataset"
_LEFT_OUT = ("seconds",)
_COUNTS = ("rows", "prompts")


@dataclass(frozen=True, slots=True)
class Difference:
    """A name with what the first and the second version have for it."""

    name: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class MetricPair:
    """A metric of both versions, each on the evaluation rows of its own run; None where one has not measured it."""

    name: str
    first: Measurement | None
    second: Measurement | None


@dataclass(frozen=True, slots=True)
class VersionDiff:
    """Everything that differs between two versions; what is equal is left out, except of the metrics.

    Attributes:
        data: What the data gate counted.
        sources: The pins of files, as SOURCE: FILE.
        recipe: The settings, as STEP.KNOB.
        base: The pins of the base model's files.
        code: The hashes of the steps' code.
        versions: The versions that each was compared with or started from.
        metrics: The metrics of both.
        same_judgement: Whether both were judged by the same rules and evaluation data.
    """

    data: tuple[Difference, ...]
    sources: tuple[Difference, ...]
    recipe: tuple[Difference, ...]
    base: tuple[Difference, ...]
    code: tuple[Difference, ...]
    versions: tuple[Difference, ...]
    metrics: tuple[MetricPair, ...]
    same_judgement: bool


def compare(store: Store, first: Release, second: Release) -> VersionDiff:
    """Compare two versions of a line."""
    recipes = [read_document(store, release, RECIPE) for release in (first, second)]
    evaluations = [read_document(store, release, EVALUATION) for release in (first, second)]
    settings, sources, code = ([_table(recipe, name) for recipe in recipes] for name in ("steps", "sources", "code"))
    names = ("champion", "anchor", "start")
    return VersionDiff(
        data=_differences(*(_counts(release) for release in (first, second))),
        sources=_differences(*(_flat(table, ": ", leave_out="base_model") for table in sources)),
        recipe=_differences(*(_flat(table, ".") for table in settings)),
        base=_differences(*(_pins(release) for release in (first, second))),
        code=_differences(*code),
        versions=_differences(*({name: recipe.get(name) for name in names} for recipe in recipes)),
        metrics=tuple(_metrics(*evaluations)),
        same_judgement=first.judgement == second.judgement,
    )


def recipe_changes(first: Document, second: Document, steps: Collection[str]) -> tuple[Difference, ...]:
    """Return what differs between two recipes, of some steps: settings, code, and the pins of sources."""
    settings, code = (
        [{name: value for name, value in _table(recipe, table).items() if name in steps} for recipe in (first, second)]
        for table in ("steps", "code")
    )
    sources = [_flat(_table(recipe, "sources"), ": ") for recipe in (first, second)]
    return (
        *_differences(*(_flat(table, ".") for table in settings)),
        *_differences(*sources),
        *_differences(*({f"the code of {name}": value for name, value in table.items()} for table in code)),
    )


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Difference, ...]:
    names = [*first, *(name for name in second if name not in first)]
    return tuple(
        Difference(name, _as_text(first.get(name)), _as_text(second.get(name)))
        for name in names
        if first.get(name) != second.get(name)
    )


def _metrics(first: Document, second: Document) -> Iterator[MetricPair]:
    """Pair the metrics of the two challengers; the primary metric comes first."""
    tables = [_table(contestants(evaluation), "challenger") for evaluation in (first, second)]
    primary = [evaluation.get("metric") for evaluation in (second, first)]
    names = [name for name in (*primary, *tables[0], *tables[1]) if isinstance(name, str)]
    for name in dict.fromkeys(names):
        pair = MetricPair(name, measurement(tables[0], name), measurement(tables[1], name))
        is_end = name.endswith(("_low", "_high"))
        if not is_end and name not in _COUNTS and (pair.first or pair.second):
            yield pair


def _counts(release: Release) -> Document:
    numbers = _table(release.numbers, _DATA)
    return {name: value for name, value in numbers.items() if name not in _LEFT_OUT}


def _pins(release: Release) -> Document:
    return _table(release.base, "files")


def _table(document: Document, name: str) -> Document:
    """Return an object inside a document; an empty one where there is none."""
    value = document.get(name)
    return value if isinstance(value, dict) else {}


def _flat(tables: Document, separator: str, leave_out: str = "") -> Document:
    """Return the fields of several objects under one name each; a missing object has no fields."""
    return {
        f"{name}{separator}{field}": value
        for name, table in tables.items()
        if isinstance(table, dict) and name != leave_out
        for field, value in table.items()
    }


def _as_text(value: object) -> str:
    if value is None:
        return _ABSENT
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    # The beginning of a hash is enough to see that it is another one.
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b", r"\1", text)
