"""The grid of a lab: which settings are combined, and which combinations the line refuses.

Command: `qlora-retrain lab CONFIG --vary train.rank=4,16,64 --vary train.method=lora,dora`
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from qlora_retrain.config import bounded_yaml
from qlora_retrain.config.line import section_model
from qlora_retrain.core import uris
from qlora_retrain.core.errors import UsageError

# The sections whose settings may differ. With others the runs would not share their data and their measure.
SECTIONS = ("quantize", "train", "merge")
_OF_EARLIER_VERSIONS = ("train.start", "merge.soup")
SEED = "train.seed"
# More would be a mistake: a day has 1,440 minutes.
MAX_POINTS = 1000
Built = TypeVar("Built")


@dataclass(frozen=True, slots=True)
class Variation:
    """A setting that is varied, e.g. `train.rank`, and its values as YAML reads them."""

    knob: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of values.

    Attributes:
        settings: Pairs of a knob and its value, in the order of the command line.
        seed: The value of `train.seed`; None: the line's.
    """

    settings: tuple[tuple[str, Any], ...]
    seed: int | None = None

    @property
    def overrides(self) -> list[str]:
        """Return what `--set` would say."""
        seed = () if self.seed is None else ((SEED, self.seed),)
        return [f"{knob}={json.dumps(value)}" for knob, value in (*self.settings, *seed)]

    @property
    def label(self) -> str:
        """Return the varied settings in words, e.g. `rank 8, method dora`; two of one name have their sections."""
        names = [knob.partition(".")[2] for knob, _ in self.settings]
        words = [
            f"{name if names.count(name) == 1 else knob} {_as_text(value)}"
            for name, (knob, value) in zip(names, self.settings, strict=True)
        ]
        return ", ".join(words) or "the line's settings"

    @property
    def run_label(self) -> str:
        """Return the label with the seed."""
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Impossible:
    """A point that the line refuses, and why."""

    point: Point
    reason: str


@dataclass(frozen=True, slots=True)
class Grid(Generic[Built]):
    """The points that can be run, each with what was built for it, and those that cannot."""

    points: list[tuple[Point, Built]]
    impossible: list[Impossible]


def parse_variation(text: str) -> Variation:
    """Parse `SECTION.KNOB=V1,V2,...`; each value is YAML, so a list stands in brackets.

    Raises:
        UsageError: For another form, for a section that runs must share, and for a value that stands there twice.
    """
    knob, equals, values_text = text.partition("=")
    section, dot, name = knob.partition(".")
    place = f"--vary {uris.mask_secrets(text)}"
    if not (equals and dot and name and values_text.strip()):
        raise UsageError(f"{place}: expected SECTION.KNOB=VALUE,VALUE, e.g. train.rank=4,16,64")
    if section not in SECTIONS:
        raise UsageError(
            f"{place}: expected a setting of {', '.join(SECTIONS)}, since all runs of a lab share their data and are "
            f"judged in one way; set {knob} for all of them with --set"
        )
    if knob in _OF_EARLIER_VERSIONS:
        raise UsageError(
            f"{place}: no run of a lab reads an earlier version, since versions have learnt the rows that judge; leave "
            "it out"
        )
    values, _ = bounded_yaml.parse(f"[{values_text}]", place)
    texts = [json.dumps(value) for value in values]
    if repeated := next((value for value in texts if texts.count(value) > 1), None):
        raise UsageError(f"{place}: names the value {repeated} twice; name each value once")
    return Variation(knob, tuple(values))


def points_of(variations: Sequence[Variation], num_seeds: int | None) -> list[Point]:
    """Return every combination of the values, the last variation changing fastest, and of each all seeds in turn.

    Raises:
        UsageError: If a setting is varied twice, or there are more than `MAX_POINTS` points.
    """
    knobs = [variation.knob for variation in variations] + ([SEED] if num_seeds is not None else [])
    if repeated := next((knob for knob in knobs if knobs.count(knob) > 1), None):
        also = "; --seeds varies it too" if repeated == SEED and num_seeds is not None else ""
        raise UsageError(f"--vary {repeated}: expected each setting once, found it twice{also}; name all values there")
    seeds = [None] if num_seeds is None else list(range(num_seeds))
    num_points = len(seeds)
    for variation in variations:
        num_points *= len(variation.values)
    if num_points > MAX_POINTS:
        raise UsageError(f"the grid has {num_points:,} points, expected at most {MAX_POINTS:,}; leave out values")
    combinations = itertools.product(*([(v.knob, value) for value in v.values] for v in variations))
    return [Point(settings, seed) for settings in combinations for seed in seeds]


def build_grid(points: Sequence[Point], build: Callable[[Point], Built], *, skip_impossible: bool) -> Grid[Built]:
    """Build every point, and refuse what cannot be built before anything runs.

    A value that its field refuses is a mistake. What is refused beside other values is an impossible combination, which
    may be left out.

    Args:
        points: The points.
        build: Returns what a point needs, or raises `UsageError` where the line refuses it.
        skip_impossible: Leave impossible combinations out.

    Raises:
        UsageError: For an unknown setting or a value that its field refuses, for an impossible combination, and where
            no combination is possible.
    """
    built: list[tuple[Point, Built]] = []
    impossible: list[Impossible] = []
    for point in points:
        try:
            built.append((point, build(point)))
        except UsageError as error:
            impossible.append(Impossible(point, str(error)))

    possible = {_as_json(setting) for point, _ in built for setting in point.settings}
    for item in impossible:
        for knob, value in item.point.settings:
            if _as_json((knob, value)) not in possible and not _fits_field(knob, value):
                raise UsageError(f"--vary {knob}={_as_text(value)}: {item.reason}")
    if impossible and not (skip_impossible and built):
        num_impossible = len({item.point.label for item in impossible})
        total = len({point.label for point in points})
        advice = "change --vary, or leave them out with --skip-impossible" if built else "change --vary"
        raise UsageError(
            f"{impossible[0].point.label}: {impossible[0].reason}\n{num_impossible} of {total} combinations cannot be "
            f"run: {advice}"
        )
    return Grid(built, impossible)


def _fits_field(knob: str, value: Any) -> bool:
    """Return whether a section has the field, and the field alone takes the value."""
    section, _, name = knob.partition(".")
    field = section_model(section).model_fields.get(name)
    if field is None:
        return False
    try:
        TypeAdapter(cast("Any", Annotated[field.annotation, field])).validate_python(value)
    except ValidationError:
        return False
    return True


def skipped(grid: Grid[Any]) -> Iterator[tuple[str, str]]:
    """Yield the label and the reason of every combination that was left out."""
    reasons = {item.point.label: item.reason for item in reversed(grid.impossible)}
    yield from sorted(reasons.items())


def _as_json(setting: tuple[str, Any]) -> str:
    return json.dumps(setting)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
