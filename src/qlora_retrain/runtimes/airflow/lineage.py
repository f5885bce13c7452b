"""What a task read and made: as Airflow's assets, and as datasets of OpenLineage where its provider is installed.

    source              its own URI, e.g. s3://my-data/tickets; its version is the hash of its content
    artifact            STORE/LINE/ARTIFACT, a name and no place; its version is its key
    a version's model   STORE/models/LINE, as the asset; its version is the version's name

The names stay the same from run to run, so a lineage server draws one graph for a line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow.sdk import Asset

from qlora_retrain.core import graph

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qlora_retrain.config.line import LineConfig
    from qlora_retrain.core.graph import Step
    from qlora_retrain.core.outcome import Number
    from qlora_retrain.pipeline.plan import Plan


def inlets(step: Step, config: LineConfig) -> list[Asset]:
    """Return the assets that a step reads: the line's raw data, which each line has as an asset of its own."""
    # Airflow keeps one of several definitions of an asset. Beside that of a schedule, which has a trigger that watches
    # the data, this one would take the trigger away; and there the asset is in the DAG's graph already.
    has_schedule = getattr(config.schedule, "on_new_data", False)
    if has_schedule or all(source.name != "raw_data" for source in step.reads):
        return []
    return [
        Asset(
            name=f"{config.line}.raw_data",
            # With `x-` Airflow looks for no provider that knows the scheme, which takes longer than a hundred lines.
            uri=f"x-qlora-retrain://raw-data/{config.line}",
            group="raw_data",
            extra={"source": config.sources.raw_data.uri},
        )
    ]


def model_asset(plan: Plan) -> Asset:
    """Return the asset of a line's models."""
    return Asset(_model_uri(plan), group="model")


def model_extra(plan: Plan, numbers: Mapping[str, Number]) -> dict[str, Any]:
    """Return what the event of a new version says of it.

    Args:
        plan: The plan.
        numbers: The numbers of the release.
    """
    from qlora_retrain.runtimes.airflow.run_message import two_numbers

    return {
        **{name: numbers.get(name) for name in ("version", "published", "moved")},
        "alias": numbers.get("promoted_to"),
        "key": plan.step(graph.producer_name("release")).key,
        "run": plan.run_id,
        "metrics": two_numbers(plan),
    }


def of_step(plan: Plan, step_name: str) -> Any:
    """Return the inputs and outputs of a step as OpenLineage's provider wants them; outputs only where they exist."""
    from airflow.providers.openlineage.extractors import OperatorLineage

    from qlora_retrain.pipeline import status

    step, manifest = graph.step(step_name), status.find_manifest(plan, step_name)
    outputs = []
    if manifest is not None:
        outputs.append(_dataset(f"{plan.root}/{plan.line}/{step.makes}", manifest.key, numbers=manifest.numbers))
        if version := manifest.numbers.get("version"):
            outputs.append(_dataset(_model_uri(plan), str(version), kind="MODEL"))
    return OperatorLineage(inputs=list(_inputs(plan, step)), outputs=outputs)


def _inputs(plan: Plan, step: Step) -> Iterator[Any]:
    for item in step.reads:
        if maker := graph.producer(item.name):
            yield _dataset(f"{plan.root}/{plan.line}/{item.name}", plan.step(maker.name).key)
        elif item.name in graph.VERSION_PARTS:
            if version := plan.pinned_version(item.name):
                yield _dataset(_model_uri(plan), version.version, kind="MODEL")
        elif source := plan.sources.get(item.name):
            yield _dataset(source.uri, source.key())


def _dataset(uri: str, version: str, *, kind: str | None = None, numbers: Mapping[str, Number] | None = None) -> Any:
    """Return a dataset, named as OpenLineage names places: the host or bucket, and the path in it."""
    from openlineage.client.event_v2 import Dataset
    from openlineage.client.facet_v2 import dataset_type_dataset, dataset_version_dataset, tags_dataset

    parts = urlsplit(uri)
    namespace = "file" if parts.scheme == "file" else f"{parts.scheme}://{parts.netloc}"
    facets: dict[str, Any] = {"version": dataset_version_dataset.DatasetVersionDatasetFacet(version)}
    if kind is not None:
        facets["datasetType"] = dataset_type_dataset.DatasetTypeDatasetFacet(kind)
    if numbers:
        tags = [
            tags_dataset.TagsDatasetFacetFields(key=name, value=str(value), source="qlora-retrain")
            for name, value in numbers.items()
            if value is not None
        ]
        facets["tags"] = tags_dataset.TagsDatasetFacet(tags=tags)
    return Dataset(namespace, parts.path if namespace == "file" else parts.path.strip("/"), facets=facets)


def _model_uri(plan: Plan) -> str:
    return f"{plan.root}/models/{plan.line}"
