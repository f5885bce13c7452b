"""Say of a plan whether its training fits into a memory, and with which settings it would.

Everything comes from the base's config.json, the settings and, where they are in the store, the dataset's profile and
earlier runs of the same base. Nothing of it enters a key or a plan.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_retrain.core import graph
from qlora_retrain.core.errors import Problem
from qlora_retrain.lm import memory_model
from qlora_retrain.lm.adapter_scale import has_scale
from qlora_retrain.lm.memory_model import Memory, MicroBatch, Settings
from qlora_retrain.lm.model_shape import ModelShape
from qlora_retrain.pipeline import past_runs, status
from qlora_retrain.pipeline.model_folder import ModelFolder
from qlora_retrain.pipeline.past_runs import PastRun, RowLengths
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store

GIB = 2**30
# Beside what torch allocates: CUDA's own memory and its libraries'; on a CPU two Python processes with their libraries.
FIXED_BYTES = {"cuda": round(0.7 * GIB), "cpu": round(0.85 * GIB)}
# Factors of what torch allocates, low and high, without earlier runs. Weights, adapter and states are exact but for
# rounding up. What depends on the rows was within 10 % where it was compared, and an allocator loses some to gaps.
STATIC_RANGE, CHANGING_RANGE = (0.99, 1.03), (0.85, 1.25)
# The same for both, with earlier runs: their rows differ from these.
CORRECTED_RANGE = (0.93, 1.12)


class NotEstimated(Exception):
    """What an estimate needs is not there; the message says what."""


@dataclass(frozen=True)
class Target:
    """What the training runs on.

    Attributes:
        label: Its name for a person.
        memory_bytes: What a training process may use; None where nobody limits it.
        flops: Operations a second of one card; None where they are not in a list.
        price_per_hour: Of one card.
    """

    label: str
    memory_bytes: int | None
    flops: float | None = None
    price_per_hour: float | None = None


@dataclass(frozen=True)
class Work:
    """What a training is, as far as it can be read.

    Attributes:
        shape: The base's.
        settings: The line's.
        train: The section `train`.
        lengths: The training rows; None before they are counted.
        max_tokens: The longest row that the data gate lets pass.
        past_runs: Earlier trainings of the same base on the same kind of device.
    """

    shape: ModelShape
    settings: Settings
    train: Mapping[str, Any]
    lengths: RowLengths | None
    max_tokens: int
    past_runs: Sequence[PastRun] = ()

    @property
    def longest(self) -> int:
        """The tokens of the longest row."""
        return self.lengths.longest if self.lengths else self.max_tokens

    @property
    def micro_batch_size(self) -> int:
        """The rows of a micro-batch of one process; where training chooses it (`auto`), the most that it may be."""
        rows_of_process = -(-int(self.train["global_batch_size"]) // int(self.train["num_processes"]))
        size = self.train["micro_batch_size"]
        return min(size, rows_of_process) if isinstance(size, int) else rows_of_process

    def batch(self, rows: int, longest: int) -> MicroBatch:
        """Return a micro-batch of rows of this length, with as much loss as the rows have in the mean."""
        tokens = rows * longest
        fraction = self.lengths.supervised / max(1, self.lengths.tokens) if self.lengths else 1.0
        return MicroBatch(rows, longest, tokens, max(1, round(fraction * tokens)))


@dataclass(frozen=True)
class MemoryForecast:
    """The memory of a training process, in bytes.

    Attributes:
        parts: What torch allocates at the peak, by the arithmetic alone.
        low: The least that the process may need, with all that is not torch's.
        likely: What it needs as far as one can say.
        high: The most.
        num_runs: How many earlier runs corrected it.
    """

    parts: Memory
    low: int
    likely: int
    high: int
    num_runs: int


def read_work(plan: Plan, document: Mapping[str, Any], lengths: RowLengths | None) -> Work:
    """Return what a plan's training is.

    Args:
        plan: The plan.
        document: The base's config.json.
        lengths: The training rows, where they were counted.
    """
    sections = {graph.step(step.name).section: step.config for step in plan.steps}
    settings = Settings.from_sections(sections["train"], sections["quantize"])
    max_tokens = sections["data"]["max_length_tokens"]
    return Work(ModelShape.from_config(document), settings, sections["train"], lengths, max_tokens)


def load_work(plan: Plan, *, is_on_gpu: bool = False) -> Work:
    """Return what a plan's training is, with all that the base, the data set and earlier runs say of it.

    Args:
        plan: The plan.
        is_on_gpu: Whether to estimate for a GPU a plan that was made where there is none.

    Raises:
        NotEstimated: If the base's config.json cannot be read yet.
        UnknownShape: If the family's memory is not counted.
    """
    work = read_work(plan, read_config(plan), past_runs.read_lengths(plan))
    if is_on_gpu and work.settings.device != "cuda":
        # As `auto` would be resolved where there is a GPU.
        settings = dataclasses.replace(
            work.settings, device="cuda", precision="bfloat16", attention="sdpa", is_paged=True
        )
        work = dataclasses.replace(work, settings=settings)
    return dataclasses.replace(work, past_runs=past_runs.find_past_runs(plan, work.settings.device))


def read_config(plan: Plan) -> Mapping[str, Any]:
    """Return the config.json of a plan's base.

    Raises:
        NotEstimated: If it is not here yet, as that of a commit before it is fetched, or cannot be read.
    """
    source = plan.sources["base_model"]
    document: Mapping[str, Any] | None
    try:
        if source is not None and not source.is_commit:
            document = ModelFolder.from_source(source).read_objects("config.json").get("config.json")
        else:
            document = _quantized_config(plan)
    except (Problem, ValueError) as problem:
        raise NotEstimated(f"the base's config.json cannot be read: {problem}") from problem
    if document is None:
        raise NotEstimated("the base has no config.json")
    return document


def _quantized_config(plan: Plan) -> Mapping[str, Any]:
    """Return the config.json of the base's 4-bit form, which has the same sizes."""
    manifest = status.find_manifest(plan, graph.producer_name("base_nf4"))
    if manifest is None:
        raise NotEstimated("the files of a commit are read where they are fetched; quantize_model has not run yet")
    document: Mapping[str, Any] = json.loads(open_store(plan.root).read(f"{manifest.prefix}/config.json").data)
    return document


def forecast_memory(work: Work) -> MemoryForecast:
    """Return the memory of a training process: from the longest rows, corrected by what earlier runs measured."""
    return _memory(work, work.settings, work.micro_batch_size, work.longest)


def _memory(work: Work, settings: Settings, rows: int, longest: int) -> MemoryForecast:
    parts = memory_model.estimate(work.shape, settings, work.batch(rows, longest))
    ratios = list(_ratios(work))
    ratio = statistics.median(ratios) if ratios else 1.0
    static_range, changing_range = (CORRECTED_RANGE,) * 2 if ratios else (STATIC_RANGE, CHANGING_RANGE)
    # Most micro-batches have shorter rows than the longest; the peak is that of the longest among them.
    short = work.lengths.long if work.lengths else longest // 2
    least = memory_model.estimate(work.shape, settings, work.batch(rows, min(short, longest)))
    low, high = (
        static * memory.static + changing * (memory.total - memory.static)
        for static, changing, memory in zip(static_range, changing_range, (least, parts), strict=True)
    )
    fixed = FIXED_BYTES[settings.device]
    return MemoryForecast(
        parts=parts,
        low=round(fixed + ratio * low),
        likely=round(fixed + ratio * parts.total),
        high=round(fixed + ratio * high),
        num_runs=len(ratios),
    )


def _ratios(work: Work) -> Iterator[float]:
    """Yield measured over predicted, of what torch allocates, for each earlier run that tells it."""
    for run in work.past_runs:
        settings = run.settings
        if run.peak_bytes is None or run.lengths is None or settings.precision != work.settings.precision:
            continue
        earlier = dataclasses.replace(work, lengths=run.lengths, past_runs=())
        predicted = memory_model.estimate(
            work.shape, settings, earlier.batch(run.micro_batch_size, run.lengths.longest)
        ).total
        # torch's own count of a GPU's memory is without what is fixed.
        fixed = FIXED_BYTES["cpu"] if settings.device == "cpu" else 0
        measured = run.peak_bytes / settings.num_processes - fixed
        yield min(2.0, max(0.5, measured / predicted))


def fitting_change(work: Work, memory_bytes: int) -> dict[str, Any] | None:
    """Return the smallest change of the section `train` with which it surely fits; None where none does.

    What changes no result comes first: fewer rows in a micro-batch, then layers that are computed twice; then states of
    8 bits, then a smaller adapter where there is one. Each keeps the changes before it, and the micro-batch is as large
    as it may be.
    """
    rank, target_modules = work.settings.rank, work.settings.target_modules
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {})]
    if work.settings.checkpoint_every != 1:
        changes.append(({"checkpoint_every": 1}, {"gradient_checkpointing": 1}))
    if work.settings.optimizer_bits == 32:
        changes.append(({"optimizer_bits": 8}, {"optimizer": "paged_adamw_8bit"}))
    if has_scale(work.settings.method) and rank > 8:
        changes.append(({"rank": 8}, {"rank": 8}))
    if has_scale(work.settings.method) and target_modules == "all-linear":
        changes.append(({"target_modules": "attention"}, {"target_modules": "attention"}))

    settings, train_changes = work.settings, dict[str, Any]()
    for fields, train_fields in changes:
        settings, train_changes = dataclasses.replace(settings, **fields), train_changes | train_fields
        rows = _largest(work, settings, memory_bytes)
        if rows:
            is_smaller = rows < work.micro_batch_size
            return ({"micro_batch_size": rows} if is_smaller else {}) | train_changes
    return None


def _largest(work: Work, settings: Settings, memory_bytes: int) -> int:
    """Return the largest micro-batch, at most the line's, whose high estimate fits; 0 where none does."""
    rows = work.micro_batch_size
    while rows:
        accumulates = settings.accumulates or rows < work.micro_batch_size
        trial = dataclasses.replace(settings, accumulates=accumulates)
        if _memory(work, trial, rows, work.longest).high <= memory_bytes:
            return rows
        rows //= 2
    return 0
