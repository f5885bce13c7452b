"""Read YAML into a section and report every error at once, each with its line, its path and the near match.

No message repeats what could be a secret: user info and queries of URIs are masked, and whole sections are not shown.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from qlora_retrain.config import bounded_yaml
from qlora_retrain.config.fields import Section
from qlora_retrain.config.renamed import renamed_to
from qlora_retrain.core import uris
from qlora_retrain.core.errors import UsageError

_MAX_VALUE_CHARACTERS = 80
_MAX_FAULTS = 30
Model = TypeVar("Model", bound=Section)
Document = dict[str, Any]


def load_section(
    model: type[Model],
    source: Path | str,
    overrides: Sequence[str] = (),
    prepare: Callable[[Document], Document] = lambda document: document,
    context: Mapping[str, Any] | None = None,
) -> Model:
    """Read a document and validate it as a model.

    Args:
        model: The model of the whole document.
        source: The YAML file, or the document itself as YAML or JSON text.
        overrides: `section.field=value` strings, with the value in YAML.
        prepare: Changes the document before it is validated.
        context: What the model's validators may ask for.

    Raises:
        UsageError: With every error of the document and of the overrides, one per line.
    """
    name, text = ("the document", source) if isinstance(source, str) else (str(source), bounded_yaml.read_text(source))
    document, node = bounded_yaml.parse(text, name)
    try:
        lines = _line_numbers(node)
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: not valid YAML: {bounded_yaml.fault(error)}") from error

    if not isinstance(document, dict):
        raise UsageError(f"{name}: expected a mapping of sections, found {type(document).__name__}")
    for item in overrides:
        _apply_override(document, item)
    try:
        document = _with_whole_characters(document)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name}: a text holds half of a surrogate pair ({error.object[error.start : error.end]!a}), which is no "
            "character; write the character itself"
        ) from error

    # The file and the overrides are validated together: an override may be what makes the file valid.
    try:
        return model.model_validate(prepare(document), context=context)
    except ValidationError as error:
        faults = itertools.islice(_faults(model, error), _MAX_FAULTS)
        messages = [
            f"{name}:{_nearest_line(lines, path)}: {_with_field(uris.mask_secrets('.'.join(path)), fault)}"
            for path, fault in faults
        ]
        if (left := error.error_count() - _MAX_FAULTS) > 0:
            messages.append(f"{name}: and {left:,} more faults")
        raise UsageError("\n".join(messages)) from error


def _apply_override(document: dict[str, Any], item: str) -> None:
    """Set one `section.field=value` in the document, adding the sections that it does not have."""
    path, equals, value = item.partition("=")
    if not equals or not path:
        raise UsageError(
            f"--set {uris.mask_secrets(item)}: expected section.field=value, e.g. train.learning_rate=1e-4"
        )

    *parents, last = path.split(".")
    if len(parents) > bounded_yaml.MAX_DEPTH:
        raise UsageError(f"--set {path[:_MAX_VALUE_CHARACTERS]}...: expected at most {bounded_yaml.MAX_DEPTH} sections")
    target = document
    for name in parents:
        child = target.setdefault(name, {})
        # A source may be written as its URI alone, and a schedule as its cron, and have other fields all the same.
        if isinstance(child, str) and target is document.get("sources"):
            child = target[name] = {"uri": child}
        if name == "schedule" and target is document and isinstance(child, str | None):
            child = target[name] = {"cron": child} if child else {}
        if not isinstance(child, dict):
            raise UsageError(f"--set {path}: {name} is {type(child).__name__}, it has no fields")
        target = child

    target[last], _ = bounded_yaml.parse(value, f"--set {path}")


def _with_whole_characters(value: Any) -> Any:
    """Return the value with surrogate pairs joined: JSON writes some characters so, and YAML takes them for two.

    Raises:
        UnicodeEncodeError: For half of a pair.
    """
    if isinstance(value, str):
        if not value.isascii():
            value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
            value.encode()
        return value
    if isinstance(value, dict):
        return {_with_whole_characters(key): _with_whole_characters(item) for key, item in value.items()}
    return [_with_whole_characters(item) for item in value] if isinstance(value, list) else value


def _path_in(message: str) -> tuple[str, ...]:
    """Return the path of the field that a message begins with, such as `train.method: ...`; else nothing."""
    field = re.match(r"[a-z_]+(?:\.[a-z_]+)+(?=:| and )", message)
    return tuple(field[0].split(".")) if field else ()


def _with_field(field: str, fault: str) -> str:
    """Return a fault with the name of its field before it, unless it begins with that."""
    return fault if not field or fault.startswith(field) else f"{field}: {fault}"


def _faults(model: type[Section], error: ValidationError) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path and the text of each error; which fields a section may have is said once."""
    listed: set[tuple[str, ...]] = set()
    for item in error.errors():
        # pydantic puts a union's branches into the path, as parts like `list[str]`; a person wrote none of them.
        path = tuple(str(part) for part in item["loc"] if _is_field(str(part)))

        if item["type"] == "extra_forbidden":
            # From `loc`, because a name that a person wrote may look like a branch.
            *parents, unknown = map(str, item["loc"])
            allowed = _fields_at(model, parents)
            near = difflib.get_close_matches(unknown, allowed, n=1)
            hint = f"allowed: {', '.join(allowed)}" if tuple(parents) not in listed else "see above for those allowed"
            if near:
                hint = f"did you mean {near[0]}?"
            else:
                listed.add(tuple(parents))
            hint = renamed_to(".".join((*parents, unknown))) or hint
            yield (*parents, unknown), f"unknown field; {hint}"
        elif item["type"] == "missing":
            yield path, "required, but not set"
        else:
            message = item["msg"].removeprefix("Value error, ")
            # What several fields say together is wrong, and the message names them.
            if item["type"] == "value_error" and isinstance(item["input"], dict | Section):
                yield path or _path_in(message), message
                continue
            yield path, f"{message}; found {_describe(item['input'])}" + _near_choice(item)


def _describe(value: Any) -> str:
    """Return a value as a message may show it: no user info, no query, and nothing of what a whole section holds."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"

    text = uris.mask_secrets(repr(value))
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[:_MAX_VALUE_CHARACTERS]}..."


def _is_field(part: str) -> bool:
    return part.isidentifier() or part.isdigit()


def _near_choice(item: Any) -> str:
    """Return the choice that is most like the value, as the end of a message; empty where no choice is like it."""
    if item["type"] != "literal_error":
        return ""

    # pydantic has the choices only as text: 'cosine', 'linear' or 'constant'.
    choices = [c.strip("'") for c in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]
    near = difflib.get_close_matches(str(item["input"]), choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _fields_at(model: type[Section], path: Sequence[str]) -> list[str]:
    """Return the names of the fields that the section at the path may have."""
    for name in path:
        # Any other name is an index of a list, or a branch of a union.
        if name in model.model_fields:
            model = _section_in(model.model_fields[name].annotation) or model
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """Return the section that an annotation holds: itself, or one that is optional or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((section for part in get_args(annotation) if (section := _section_in(part))), None)


def _line_numbers(node: yaml.Node | None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Return the line number of every path in a document.

    Raises:
        yaml.MarkedYAMLError: If a mapping has one key twice, of which `yaml.safe_load` would silently keep the last.
    """
    lines: dict[tuple[str, ...], int] = {}

    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                raise yaml.MarkedYAMLError(problem=f"{'.'.join(here)} is written twice", problem_mark=key.start_mark)
            lines[here] = key.start_mark.line + 1
            lines.update(_line_numbers(value, here))

    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[*path, str(index)] = value.start_mark.line + 1
            lines.update(_line_numbers(value, (*path, str(index))))
    return lines


def _nearest_line(lines: Mapping[tuple[str, ...], int], path: tuple[str, ...]) -> int:
    """Return the line of the path, or of the nearest section around it: a missing field has no line of its own."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)
