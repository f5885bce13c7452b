"""Read YAML into a section: the whole document at once; every error has its path, what was found and the near match."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from qlora_retrain.config.fields import Section
from qlora_retrain.core import uris
from qlora_retrain.core.errors import UsageError

_SHOWN_CHARACTERS = 80
Model = TypeVar("Model", bound=Section)
Document = dict[str, Any]


def read(
    model: type[Model],
    source: Path | str,
    overrides: Sequence[str] = (),
    prepare: Callable[[Document], Document] = lambda document: document,
) -> Model:
    """A document as a model.

    Args:
        model: What it must be.
        source: The YAML file, or the document itself as YAML or JSON text.
        overrides: `section.field=value` strings, the value in YAML.
        prepare: Changes the document before it is checked.

    Raises:
        UsageError: With every error of the document and of the overrides, one a line.
    """
    name, text = ("the given document", source) if isinstance(source, str) else (str(source), _text(source))
    try:
        document = yaml.safe_load(text)
        lines = _line_numbers(yaml.compose(text))
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: not valid YAML: {_yaml_fault(error)}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{name}: wanted a mapping of sections, found {type(document).__name__}")
    for item in overrides:
        _apply(document, item)
    try:
        return model.model_validate(prepare(document))
    except ValidationError as error:
        messages = _messages(model, error)
        found = [f"{name}:{_nearest(lines, path)}: {uris.masked('.'.join(path))}: {fault}" for path, fault in messages]
        raise UsageError("\n".join(found)) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from error


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


def _messages(model: type[Section], error: ValidationError) -> Iterator[tuple[tuple[str, ...], str]]:
    for item in error.errors():
        # A union's branches appear as path parts like `list[str]`; a person's path has none of them.
        path = tuple(str(part) for part in item["loc"] if _is_field(str(part)))
        if item["type"] == "extra_forbidden":
            *parents, unknown = map(str, item["loc"])  # whatever its name looks like
            allowed = _fields_at(model, parents)
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


def _fields_at(model: type[Section], path: Sequence[str]) -> list[str]:
    for name in path:
        if name in model.model_fields:  # otherwise an index of a list, or a branch of a union
            model = _section_in(model.model_fields[name].annotation) or model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that an annotation holds: itself, optional, or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _line_numbers(node: yaml.Node | None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in found:
                raise yaml.MarkedYAMLError(problem=f"{'.'.join(here)} is written twice", problem_mark=key.start_mark)
            found[here] = key.start_mark.line + 1
            found.update(_line_numbers(value, here))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found[*path, str(index)] = value.start_mark.line + 1
            found.update(_line_numbers(value, (*path, str(index))))
    return found


def _nearest(lines: Mapping[tuple[str, ...], int], path: tuple[str, ...]) -> int:
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)
