"""A line's YAML: its model, and how it is read.

Command: `qlora-retrain check CONFIG`
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from qlora_retrain.config import bounded_yaml, line_sources, method_checks, part_checks, platform, schedule, sections
from qlora_retrain.config.fields import Section, operational
from qlora_retrain.config.line_sources import SourcesConfig
from qlora_retrain.config.methods import METHODS
from qlora_retrain.config.schedule import ScheduleConfig
from qlora_retrain.config.yaml_reader import load_section
from qlora_retrain.core import line_names, local_files, visible_text
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.source_access import SourceAccess

_TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")


class LineConfig(Section):
    """A line: a named series of versions, its schedule, its sources and one section per step."""

    line: str
    description: str = operational("", "shown in the Airflow UI")
    schedule: ScheduleConfig | None = operational(
        None, "when runs start by themselves; a text is its cron; null: runs start by hand only"
    )
    sources: SourcesConfig
    data: sections.DataConfig = sections.DataConfig()
    quantize: sections.QuantizeConfig = sections.QuantizeConfig()
    train: sections.TrainConfig = sections.TrainConfig()
    evaluate: sections.EvaluateConfig = sections.EvaluateConfig()
    merge: sections.MergeConfig = sections.MergeConfig()
    publish: sections.PublishConfig = sections.PublishConfig()

    @field_validator("line")
    @classmethod
    def _names_a_label(cls, value: str) -> str:
        if not line_names.is_line_name(value):
            raise ValueError(
                "expected 2 to 63 small letters, digits and hyphens, with a letter first and no hyphen last: it "
                "becomes a DAG id, a folder of the store and a label in Kubernetes"
            )
        return value

    @field_validator("description")
    @classmethod
    def _is_visible(cls, value: str) -> str:
        # Airflow writes all lines to its database at once, and PostgreSQL takes no zero byte.
        if visible_text.escape_controls(value) != value:
            raise ValueError("expected text without control characters")
        return value

    @field_validator("schedule", mode="before")
    @classmethod
    def _schedule_in_long_form(cls, value: Any) -> Any:
        return schedule.expand_short_form(value)

    @model_validator(mode="after")
    def _watched_data_can_change(self) -> LineConfig:
        uri = self.sources.raw_data.uri
        if self.schedule is not None and self.schedule.on_new_data and uri.startswith("hf://"):
            raise ValueError(
                f"schedule.on_new_data: sources.raw_data is {uri}, a commit, which never changes; keep the data in S3 "
                "or in a folder, or set schedule.cron alone"
            )
        return self

    @model_validator(mode="after")
    def _text_is_learnt_whole(self) -> LineConfig:
        if self.data.text_field and not self.data.answer_after and self.train.loss != "all":
            raise ValueError(
                "data.text_field: a text without turns has no answer to learn; set train.loss: all to learn every "
                "token, or data.answer_after to the marker after which the answer begins"
            )
        return self

    @model_validator(mode="after")
    def _no_rank_is_cut_to_a_larger_one(self) -> LineConfig:
        if isinstance(self.merge.rank, int) and self.merge.rank > self.train.rank:
            raise ValueError(
                f"merge.rank: {self.merge.rank} is more than train.rank, which is {self.train.rank}; an adapter can "
                f"only be cut: set {self.train.rank} or less, or full"
            )
        method = self.train.method
        also_corrects = f"an adapter of train.method: {method} also corrects its packed base"
        reasons = {"loftq": also_corrects, "lq-lora": also_corrects}
        if method in method_checks.WITHOUT_MATRICES:
            reasons[method] = f"with train.method: {method} there is no B A to cut or weaken"
        if self.train.modules_to_save:
            reasons[method] = "modules of train.modules_to_save learnt whole beside the adapter"
        reason = reasons.get(method)
        if reason and (self.merge.rank != "full" or isinstance(self.merge.strength, float)):
            raise ValueError(
                f"merge.rank and merge.strength: {reason}, so it ships whole; leave them out, or set train.method: lora"
            )
        return self

    @model_validator(mode="after")
    def _method_has_the_exports(self) -> LineConfig:
        if refusal := method_checks.export_refusal(self.train, self.merge.exports):
            raise ValueError(refusal)
        return self

    @model_validator(mode="after")
    def _parts_can_ship(self) -> LineConfig:
        if refusal := part_checks.refusal(self.train, self.merge, self.publish):
            raise ValueError(refusal)
        return self

    @model_validator(mode="after")
    def _is_judged_by_its_own_rows(self) -> LineConfig:
        if self.data.judge_fraction is not None:
            raise ValueError(
                "data.judge_fraction: only qlora-retrain lab sets it, with --judge-fraction: what ships is judged by "
                "the line's own evaluation and golden rows; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _method_fits_the_base_format(self) -> LineConfig:
        if refusal := METHODS[self.train.method].refusal(self.quantize.format):
            raise ValueError(refusal)
        return self

    @model_validator(mode="after")
    def _method_goes_on_and_joins(self) -> LineConfig:
        facts = METHODS[self.train.method]
        refusal = facts.start_refusal(self.train.start) or facts.soup_refusal(self.merge.soup)
        if self.train.modules_to_save and (self.train.start != "base" or self.merge.soup):
            refusal = (
                "train.modules_to_save: whole modules of earlier versions are neither a start nor averaged; leave it "
                "out, or set train.start: base and no merge.soup"
            )
        if refusal:
            raise ValueError(refusal)
        return self

    @model_validator(mode="after")
    def _replay_has_rows(self) -> LineConfig:
        if self.data.replay_fraction is not None and self.sources.replay_data is None:
            raise ValueError(
                f"data.replay_fraction: {self.data.replay_fraction:g} of the training rows are to be replay rows, and "
                "sources.replay_data is not set; name general examples there, or leave replay_fraction out"
            )
        return self

    def section(self, name: str) -> Section:
        """Return the section of that name, e.g. `train`."""
        section = getattr(self, name)
        assert isinstance(section, Section)
        return section


def section_model(name: str) -> type[Section]:
    """Return the model of a section, e.g. `TrainConfig` for `train`."""
    model = LineConfig.model_fields[name].annotation
    assert isinstance(model, type)
    assert issubclass(model, Section)
    return model


def load(source: Path | str, overrides: Sequence[str] = ()) -> LineConfig:
    """Read a line's config.

    Args:
        source: The YAML file, or the document itself as YAML or JSON text. Relative sources are taken from the file's
            folder, and so is a file in `data.template`. A text has no folder, so its sources must be URIs or absolute
            paths.
        overrides: `section.field=value` strings, with the value in YAML.

    Raises:
        UsageError: With every error of the document and of the overrides, one per line.
    """
    folder = None if isinstance(source, str) else source.parent.resolve()
    limits = platform.load(folder)

    def prepare(document: dict[str, Any]) -> dict[str, Any]:
        return _with_template_text(_with_absolute_sources(document, folder), folder, limits.access(own_folder=folder))

    return limits.accept(load_section(LineConfig, source, overrides, prepare, {"access": limits.access()}))


def document(config: LineConfig) -> dict[str, Any]:
    """Return the fields that the line sets, as JSON values that `load` reads back in any folder.

    The sources are absolute, so the document means the same on another machine (a KFP pod).
    """
    return config.model_dump(mode="json", exclude_unset=True)


def _with_absolute_sources(document: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Return the document with relative source paths resolved against the YAML's folder.

    Raises:
        UsageError: For a relative path in a document that has no folder.
    """
    declared = document.get("sources")
    # What has the wrong type stays as it is: the validation that follows reports it with its line.
    if not isinstance(declared, dict):
        return document

    sources = {}
    for name, value in declared.items():
        source = line_sources.expand_short_form(value)

        if isinstance(source, dict) and isinstance(source.get("uri"), str) and "://" not in source["uri"]:
            # A KFP pod gets the document alone, and a relative path would mean its own working folder.
            if folder is None and not Path(source["uri"]).is_absolute():
                raise UsageError(
                    f"sources.{name}: {source['uri']} is relative, and this document is not in a folder; expected a URI"
                )

            if "\0" in source["uri"]:
                raise UsageError(f"sources.{name}: a path must not hold a zero byte")
            path = (folder or Path("/")) / source["uri"]
            # The name stays: in a cache of links it is the link that has the name, and not the file.
            parent = path if path.name in ("", "..") else path.parent
            path = Path(os.path.realpath(parent), path.name if parent != path else "")
            source = {**source, "uri": path.as_uri()}
        sources[name] = source
    return {**document, "sources": sources}


def _with_template_text(document: dict[str, Any], folder: Path | None, access: SourceAccess) -> dict[str, Any]:
    """Return the document with a template's file replaced by its text, because pods get the document alone.

    Raises:
        UsageError: For a file that is not there, may not be read, or is no Jinja template.
    """
    data = document.get("data")
    if not isinstance(data, dict):
        return document
    name = data.get("template")
    if not isinstance(name, str) or "{%" in name or "{{" in name:
        return document
    if "/" not in name and Path(name).suffix not in _TEMPLATE_SUFFIXES:
        return document

    if folder is None and not Path(name).is_absolute():
        raise UsageError(f"data.template: {name} is relative, and this document is not in a folder; give its text")
    path = (folder or Path("/")) / name
    try:
        text = local_files.read_text(path, access, bounded_yaml.MAX_TEXT_BYTES)
    except UsageError as error:
        raise UsageError(f"data.template: {error}") from error
    if "{%" not in text and "{{" not in text:
        raise UsageError(f"data.template: {path} is no Jinja template: it has neither {{% nor {{{{")
    return {**document, "data": {**data, "template": text}}
