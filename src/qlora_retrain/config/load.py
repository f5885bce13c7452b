"""Read a line's YAML: the whole document at once, every error with its path, what was found and the near match."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import Field, ValidationError, field_validator

from qlora_retrain import uris
from qlora_retrain.config import sections
from qlora_retrain.config.knobs import Section, operational
from qlora_retrain.errors import UsageError

_SHOWN_CHARACTERS = 80


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


def load(path: Path, overrides: Sequence[str] = ()) -> LineConfig:
    """Read a line's config.

    Args:
        path: The YAML file; relative sources are taken from its folder.
        overrides: `section.field=value` strings, the value in YAML.

    Raises:
        UsageError: With every error of the file and of the overrides, one a line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    try:
        document = yaml.safe_load(text)
        lines = _line_numbers(yaml.compose(text))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {_yaml_fault(error)}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path}: wanted a mapping of sections, found {type(document).__name__}")
    for item in overrides:
        _apply(document, item)
    try:
        return LineConfig.model_validate(_absolute(document, path.parent.resolve()))
    except ValidationError as error:
        found = [f"{path}:{_nearest(lines, p)}: {uris.masked('.'.join(p))}: {text}" for p, text in _messages(error)]
        raise UsageError("\n".join(found)) from error


def _apply(document: dict[str, Any], item: str) -> None:
    path, equals, value = item.partition("=")
    if not equals or not path:
        raise UsageError(f"--set {uris.masked(item)}: wanted section.field=value, e.g. train.learning_rate=1e-4")
    *parents, last = path.split(".")
    target = document
    for name in parents:
        child = target.setdefault(name, {})
        if not isinstance(child, dict):
            raise UsageError(f"--set {path}: {name} is {type(child).__name__}, it has no fields")
        target = child
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {path}: the value is not valid YAML: {_yaml_fault(error)}") from error


def _absolute(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The document with relative source paths taken from the YAML's folder."""
    declared = document.get("sources")
    if not isinstance(declared, dict):
        return document
    sources = {}
    for name, value in declared.items():
        source = _source(value)
        if isinstance(source, dict) and isinstance(source.get("uri"), str) and "://" not in source["uri"]:
            source = {**source, "uri": (folder / source["uri"]).resolve().as_uri()}
        sources[name] = source
    return {**document, "sources": sources}


def _messages(error: ValidationError) -> Iterator[tuple[tuple[str, ...], str]]:
    for item in error.errors():
        # A union's branches appear as path parts like `list[str]`; a person's path has none of them.
        path = tuple(str(part) for part in item["loc"] if _is_field(str(part)))
        if item["type"] == "extra_forbidden":
            *parents, unknown = map(str, item["loc"])  # whatever its name looks like
            allowed = _fields_at(parents)
            near = difflib.get_close_matches(unknown, allowed, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(allowed)}"
            yield (*parents, unknown), f"unknown field; {hint}"
        elif item["type"] == "missing":
            yield path, "required, but not set"
        else:
            message = item["msg"].removeprefix("Value error, ")
            yield path, f"{message}; found {_shown(item['input'])}" + _near_choice(item)


def _shown(value: Any) -> str:
    """What was found, as far as a message may show it: never user info, a query, or what a whole section holds."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    text = uris.masked(repr(value))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _yaml_fault(error: yaml.YAMLError) -> str:
    """The fault and its line, without the line's text: it may hold what must not be printed."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{getattr(error, 'problem', None) or type(error).__name__}"


def _is_field(part: str) -> bool:
    return part.isidentifier() or part.isdigit()


def _near_choice(item: Any) -> str:
    if item["type"] != "literal_error":
        return ""
    choices = [c.strip("'") for c in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]
    near = difflib.get_close_matches(str(item["input"]), choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _fields_at(path: Sequence[str]) -> list[str]:
    model: type[Section] = LineConfig
    for name in path:
        annotation = model.model_fields[name].annotation
        options = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        model = next(o for o in options if isinstance(o, type) and issubclass(o, Section))
    return list(model.model_fields)


def _line_numbers(node: yaml.Node | None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in found:
                raise yaml.MarkedYAMLError(problem=f"{'.'.join(here)} is written twice", problem_mark=key.start_mark)
            found[here] = key.start_mark.line + 1
            found.update(_line_numbers(value, here))
    return found


def _nearest(lines: Mapping[tuple[str, ...], int], path: tuple[str, ...]) -> int:
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)
