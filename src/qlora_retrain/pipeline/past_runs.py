"""Read from the store what earlier training runs of the same base measured: the peak of memory, and the speed."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_retrain.core import graph
from qlora_retrain.core.errors import Problem
from qlora_retrain.lm.memory_model import Settings
from qlora_retrain.pipeline import explain, status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store
from qlora_retrain.storage.store import NotFound

# Of the same base and device; further ones tell no more, and each costs a few reads.
_MAX_RUNS = 5
_PROFILE = "profile.json"


@dataclass(frozen=True, slots=True)
class RowLengths:
    """The training rows of a dataset, as `validate_data` counted them.

    Attributes:
        rows: Their number.
        tokens: The tokens of all rows.
        supervised: Those with a loss.
        long: The length that 95 % of the rows do not exceed.
        longest: The length of the longest row.
    """

    rows: int
    tokens: int
    supervised: int
    long: int
    longest: int

    def joined(self, further: RowLengths) -> RowLengths:
        """Return the lengths of both; of 95 % of all rows no more is known than that the larger number holds."""
        return RowLengths(
            rows=self.rows + further.rows,
            tokens=self.tokens + further.tokens,
            supervised=self.supervised + further.supervised,
            long=max(self.long, further.long),
            longest=max(self.longest, further.longest),
        )


@dataclass(frozen=True, slots=True)
class PastRun:
    """A finished training run.

    Attributes:
        train: The settings of its section `train`.
        settings: What they, and those of `quantize`, mean for memory.
        lengths: Its rows; None where their profile is gone.
        micro_batch_size: The rows of a micro-batch at its end, which may be fewer than the setting.
        peak_bytes: On a GPU what torch had allocated at most; on a CPU the memory of the processes.
        tokens_per_second: None where it trained no step itself.
    """

    train: dict[str, Any]
    settings: Settings
    lengths: RowLengths | None
    micro_batch_size: int
    peak_bytes: int | None
    tokens_per_second: float | None


def read_lengths(plan: Plan) -> RowLengths | None:
    """Return the lengths of a plan's training rows; None before `validate_data` has counted them."""
    manifest = status.find_manifest(plan, graph.producer_name("dataset"))
    if manifest is None or manifest.exit_code:
        return None
    try:
        profile = json.loads(open_store(plan.root).read(f"{manifest.prefix}/{_PROFILE}").data)
        train, replay = profile["train"], profile.get("replay")
        lengths = _lengths(profile["rows"]["train"], train)
        return lengths.joined(_lengths(replay["used"], replay)) if replay else lengths
    # An older profile lacks a number, and an empty dataset has no lengths.
    except (NotFound, ValueError, KeyError, TypeError):
        return None


def _lengths(rows: Any, numbers: Mapping[str, Any]) -> RowLengths:
    return RowLengths(
        rows=int(rows),
        tokens=int(numbers["tokens"]),
        supervised=int(numbers["supervised_tokens"]),
        long=int(numbers["tokens_p95"]),
        longest=int(numbers["tokens_p100"]),
    )


def find_past_runs(plan: Plan, device: str) -> list[PastRun]:
    """Return the newest finished trainings of the plan's base on this kind of device."""
    return list(itertools.islice(_finished(plan, device), _MAX_RUNS))


def _finished(plan: Plan, device: str) -> Iterator[PastRun]:
    seen_keys: set[str] = set()
    for earlier in explain.newest_plans(open_store(plan.root)):
        train, quantize = (_step(earlier, artifact) for artifact in ("adapter", "base_nf4"))
        is_same_base = quantize.inputs == _step(plan, "base_nf4").inputs
        if not is_same_base or train.config.get("device") != device or train.key in seen_keys:
            continue
        seen_keys.add(train.key)
        # What cannot be read or verified calibrates nothing, nor does a plan of before a setting was there.
        with contextlib.suppress(Problem, KeyError, TypeError):
            manifest = status.find_manifest(earlier, train.name)
            if manifest is None or manifest.exit_code:
                continue
            numbers: dict[str, Any] = dict(manifest.numbers)
            peak_mib = numbers["peak_gpu_mib" if device == "cuda" else "peak_rss_mib"]
            yield PastRun(
                train=train.config,
                settings=Settings.from_sections(train.config, quantize.config),
                lengths=read_lengths(earlier),
                micro_batch_size=int(numbers["micro_batch_size"]),
                peak_bytes=peak_mib * 2**20 if peak_mib else None,
                tokens_per_second=numbers["tokens_per_second"],
            )


def _step(plan: Plan, artifact: str) -> Any:
    return plan.step(graph.producer_name(artifact))
