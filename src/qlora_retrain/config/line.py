"""A line's YAML: its model, and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from qlora_retrain.config import sections
from qlora_retrain.config.fields import Section, operational
from qlora_retrain.config.reading import read
from qlora_retrain.core import uris
from qlora_retrain.core.errors import UsageError


class SourceConfig(Section):
    """Where one source lies, and which of its files count."""

    uri: str = operational(..., "a path (from the YAML's folder), file://, s3:// or hf://owner/name@commit")
    files: tuple[str, ...] = operational(("**",), "glob patterns of the files that count")

    @field_validator("uri")
    @classmethod
    def _no_secrets(cls, value: str) -> str:
        uris.refuse_secrets(value)
        return value


def _source(value: Any) -> Any:
    return {"uri": value} if isinstance(value, str) else value


class SourcesConfig(Section):
    """The line's sources; the champion is not among them: the plan finds it."""

    raw_data: SourceConfig
    base_model: SourceConfig
    golden_data: SourceConfig | None = None
    reference_data: SourceConfig | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return _source(value)

    def given(self) -> dict[str, str]:
        """The URI of every source that the line has, by name."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: source.uri for name, source in found.items() if source is not None}


class LineConfig(Section):
    """A line: a named series of versions, its schedule, its sources and one section a step."""

    line: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,62}$")]
    description: str = operational("", "shown in the Airflow UI")
    schedule: str | None = operational(None, "cron expression in UTC; null: only when triggered")
    sources: SourcesConfig
    data: sections.DataConfig = sections.DataConfig()
    quantize: sections.QuantizeConfig = sections.QuantizeConfig()
    train: sections.TrainConfig = sections.TrainConfig()
    evaluate: sections.EvaluateConfig = sections.EvaluateConfig()
    merge: sections.MergeConfig = sections.MergeConfig()
    publish: sections.PublishConfig = sections.PublishConfig()
    runtime: sections.RuntimeConfig = sections.RuntimeConfig()

    @field_validator("schedule")
    @classmethod
    def _five_fields(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("@") and len(value.split()) != 5:
            raise ValueError("a cron expression has five fields: minute hour day month weekday")
        return value

    def section(self, name: str) -> Section:
        """The section of that name, e.g. `train`."""
        found = getattr(self, name)
        assert isinstance(found, Section)
        return found


def load(source: Path | str, overrides: Sequence[str] = ()) -> LineConfig:
    """Read a line's config.

    Args:
        source: The YAML file, or the document itself as YAML or JSON text. Relative sources are taken from the file's
            folder; a text has no folder, so its sources must be URIs or absolute paths.
        overrides: `section.field=value` strings, the value in YAML.

    Raises:
        UsageError: With every error of the document and of the overrides, one a line.
    """
    folder = None if isinstance(source, str) else source.parent.resolve()
    return read(LineConfig, source, overrides, lambda document: _absolute(document, folder))


def document(config: LineConfig) -> dict[str, Any]:
    """What the line sets, as JSON values that `load` reads back anywhere: its sources are absolute."""
    return config.model_dump(mode="json", exclude_unset=True)


def _absolute(document: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """The document with relative source paths taken from the YAML's folder.

    Raises:
        UsageError: For a relative path in a document that has no folder.
    """
    declared = document.get("sources")
    if not isinstance(declared, dict):
        return document
    sources = {}
    for name, value in declared.items():
        source = _source(value)
        if isinstance(source, dict) and isinstance(source.get("uri"), str) and "://" not in source["uri"]:
            if folder is None and not Path(source["uri"]).is_absolute():
                raise UsageError(
                    f"sources.{name}: {source['uri']} is relative, and this document is not in a folder; wanted a URI"
                )
            source = {**source, "uri": (folder or Path("/")).joinpath(source["uri"]).resolve().as_uri()}
        sources[name] = source
    return {**document, "sources": sources}
