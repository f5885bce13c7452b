"""What a lab varies: settings with several values each, and settings that belong together under a name.

On the command line `--vary train.rank=4,16,64`, and `--points FILE` with `{name: {section.knob: value, ...}, ...}`. A
search also takes a range of numbers, `--vary train.learning_rate=1e-5..1e-2`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_retrain.config import bounded_yaml
from qlora_retrain.core import uris
from qlora_retrain.core.errors import UsageError

# The sections whose settings may differ. With others the runs would not share their data and their measure.
SECTIONS = ("quantize", "train", "merge")
_OF_EARLIER_VERSIONS = ("train.start", "merge.soup")


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, whole ones where both ends are."""

    low: float
    high: float

    @property
    def is_logarithmic(self) -> bool:
        """Whether the ends differ by so much that factors count, and not differences."""
        return self.low > 0 and self.high >= 10 * self.low

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True, slots=True)
class Variation:
    """A setting that is varied, e.g. `train.rank`.

    Attributes:
        knob: The setting.
        values: Its values, as YAML reads them.
        range: In place of values, a range of numbers.
    """

    knob: str
    values: tuple[Any, ...]
    range: Range | None = None


@dataclass(frozen=True, slots=True)
class NamedSettings:
    """Settings that belong together, with a name; several are one more variation of a grid."""

    name: str
    settings: tuple[tuple[str, Any], ...]


def parse_variation(text: str) -> Variation:
    """Parse `SECTION.KNOB=V1,V2,...`; each value is YAML, so a list stands in brackets.

    Raises:
        UsageError: For another form, for a section that runs must share, for a value that stands there twice, and for a
            range whose ends are not numbers in their order.
    """
    knob, equals, values_text = text.partition("=")
    knob = knob.strip()
    _, dot, name = knob.partition(".")
    place = f"--vary {uris.mask_secrets(text)}"
    if not (equals and dot and name and values_text.strip()):
        raise UsageError(f"{place}: expected SECTION.KNOB=VALUE,VALUE, e.g. train.rank=4,16,64")
    _refuse_shared(knob, place)
    # A pattern has two points, too, as `\..*`, and characters that no number has.
    if ".." in values_text and re.fullmatch(r"[\w.+ -]+", values_text):
        return Variation(knob, (), _parse_range(values_text, place))
    values, _ = bounded_yaml.parse(f"[{values_text}]", place)
    texts = [json.dumps(value) for value in values]
    if repeated := next((value for value in texts if texts.count(value) > 1), None):
        raise UsageError(f"{place}: names the value {repeated} twice; name each value once")
    return Variation(knob, tuple(values))


def _parse_range(text: str, place: str) -> Range:
    low, _, high = text.partition("..")
    try:
        ends = Range(_number(low), _number(high))
    except ValueError:
        ends = Range(0, 0)
    if not ends.low < ends.high or not math.isfinite(ends.high - ends.low):
        raise UsageError(f"{place}: expected LOW..HIGH, e.g. train.learning_rate=1e-5..1e-2")
    return ends


def _number(text: str) -> float:
    # YAML takes 1e-5 for a text.
    return int(text) if re.fullmatch(r"\s*[+-]?[0-9]+\s*", text) else float(text)


def read_named(path: Path) -> tuple[NamedSettings, ...]:
    """Read a YAML file of settings by name: `{name: {section.knob: value, ...}, ...}`.

    Raises:
        UsageError: For another form, for a section that runs must share, for a name that stands there twice, and for
            two names with the same settings.
    """
    place = f"--points {path}"
    document, node = bounded_yaml.parse(bounded_yaml.read_text(path), str(path))
    _refuse_repeated(node, place)
    if not isinstance(document, dict) or not document:
        raise UsageError(f"{place}: expected names with settings, e.g. `small: {{train.rank: 4, train.alpha: 8}}`")
    named: dict[str, str] = {}
    for name, settings in document.items():
        if not (str(name).strip() and str(name).isprintable()):
            raise UsageError(f"{place}: expected a name in one line that can be printed, found {str(name)!a}")
        if not isinstance(settings, dict) or not all(isinstance(knob, str) and "." in knob for knob in settings):
            raise UsageError(f"{place}: {name}: expected settings as `section.knob: value`, e.g. `train.rank: 4`")
        for knob in settings:
            _refuse_shared(knob, f"{place}: {name}")
        same = named.setdefault(json.dumps(settings, sort_keys=True), str(name))
        if same != str(name):
            raise UsageError(f"{place}: {same} and {name} have the same settings; leave one of them out")
    return tuple(NamedSettings(str(name), tuple(settings.items())) for name, settings in document.items())


def _refuse_repeated(node: yaml.Node | None, place: str) -> None:
    """Refuse a name, or a setting of one, that stands there twice: only the last one would be trained.

    Names are compared as they are shown, so `4` and `"4"` are one.
    """
    if not isinstance(node, yaml.MappingNode):
        return
    names = [str(key.value) for key, _ in node.value]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{place}: {repeated} is written twice; give each name and each setting once")
    for _, value in node.value:
        _refuse_repeated(value, place)


def _refuse_shared(knob: str, place: str) -> None:
    if knob in _OF_EARLIER_VERSIONS:
        raise UsageError(
            f"{place}: no run of a lab reads an earlier version, since versions have learnt the rows that judge; leave "
            f"{knob} out"
        )
    if knob.partition(".")[0] not in SECTIONS:
        raise UsageError(
            f"{place}: expected a setting of {', '.join(SECTIONS)}, since all runs of a lab share their data and are "
            f"judged in one way; set {knob} for all of them with --set"
        )
