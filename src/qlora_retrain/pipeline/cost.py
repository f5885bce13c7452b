"""What the steps behind a version cost: time, GPUs, tokens, memory and energy, by step and in all.

Each step's manifest has, in its provenance, what the step cost and what the steps cost that it was made from. So a
version's cost is known from the manifests that it is published from. A step that an earlier run did has that run's id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_retrain.core import graph
from qlora_retrain.core.outcome import Number
from qlora_retrain.storage.artifact import Manifest

COSTS = "costs"  # the field of a manifest's provenance
_NOTES = (
    "transfers, publish, and attempts that were killed or that failed in a step without checkpoints are not counted",
)


class StepCost(BaseModel):
    """What a step cost; None is what was not measured.

    Attributes:
        run_id: The run that did the work.
        attempts: The attempts that are counted.
        seconds: Its time, without fetching and uploading.
        gpus: The GPUs that it used.
        gpu_seconds: Its time on each of them, added.
        tokens: The tokens that it trained on.
        peak_memory_mib: The peak of its processes' memory on the host.
        peak_gpu_memory_mib: The peak of its memory on a GPU.
        energy_wh: The energy of its GPUs; that of the machine is not in it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    run_id: str
    attempts: int = 1
    seconds: float
    gpus: int = 0
    gpu_seconds: float = 0.0
    tokens: int | None = None
    peak_memory_mib: int | None = None
    peak_gpu_memory_mib: int | None = None
    energy_wh: float | None = None


Costs = Mapping[str, StepCost]


def read(manifests: Iterable[Manifest]) -> dict[str, StepCost]:
    """Return the cost of each step behind some artifacts, in graph order; those of older releases say nothing."""
    costs: dict[str, StepCost] = {}
    for manifest in manifests:
        costs |= _parse(manifest.provenance.get(COSTS))
    return {step.name: costs[step.name] for step in graph.STEPS if step.name in costs}


def from_document(document: Mapping[str, Any]) -> dict[str, StepCost]:
    """Return the cost of each step from the content of `cost.json`."""
    return _parse(document.get("steps"))


def _parse(records: object) -> dict[str, StepCost]:
    """Return the records that can be read, by step."""
    costs: dict[str, StepCost] = {}
    for step, record in records.items() if isinstance(records, dict) else ():
        try:
            costs[step] = StepCost.model_validate(record)
        except ValidationError:
            continue
    return costs


def total(costs: Iterable[StepCost]) -> dict[str, Number]:
    """Add costs; peaks are the highest one, and what no step measured is None."""
    listed = list(costs)

    def values(name: str) -> list[float]:
        return [value for value in (getattr(cost, name) for cost in listed) if value is not None]

    tokens, energy = values("tokens"), values("energy_wh")
    return {
        "seconds": round(sum(values("seconds")), 1),
        "gpu_seconds": round(sum(values("gpu_seconds")), 1),
        "tokens": int(sum(tokens)) if tokens else None,
        "peak_memory_mib": int(max(values("peak_memory_mib"), default=0)) or None,
        "peak_gpu_memory_mib": int(max(values("peak_gpu_memory_mib"), default=0)) or None,
        "energy_wh": round(sum(energy), 3) if energy else None,
    }


def combine(last: StepCost, earlier: Iterable[StepCost]) -> StepCost:
    """Return the cost of a step from that of its last attempt, which knows all tokens, and of those before it."""
    attempts = [last, *earlier]
    sums = {name: value for name, value in total(attempts).items() if name != "tokens"}
    return last.model_copy(update={**sums, "attempts": len(attempts)})


def of_run(costs: Costs, run_id: str) -> dict[str, StepCost]:
    """Return the costs of the steps that a run did itself."""
    return {step: cost for step, cost in costs.items() if cost.run_id == run_id}


def as_document(costs: Costs, run_id: str) -> dict[str, Any]:
    """Return the content of `cost.json`. Published versions hold it, so its names never change."""
    return {
        "run_id": run_id,
        "steps": {step: cost.model_dump() for step, cost in costs.items()},
        "this_run": total(of_run(costs, run_id).values()),
        "version": total(costs.values()),
        "energy_measured": [step for step, cost in costs.items() if cost.energy_wh is not None],
        "notes": list(_NOTES),
    }


def rows(costs: Costs, run_id: str) -> list[list[Number]]:
    """Return the rows of a table for people: the steps, then both totals."""
    table: list[list[Number]] = [
        [step, "this run" if cost.run_id == run_id else cost.run_id, *_cells(cost.model_dump())]
        for step, cost in costs.items()
    ]
    own = of_run(costs, run_id)
    table.append(["this run", f"{len(own)} of {len(costs)} steps", *_cells(total(own.values()))])
    table.append(["this version in all", "", *_cells(total(costs.values()))])
    return table


HEADERS = ("step", "done by", "seconds", "GPU seconds", "tokens", "peak MiB", "peak GPU MiB", "GPU energy in Wh")


def _cells(numbers: Mapping[str, Any]) -> list[Number]:
    def cell(name: str, is_measured: bool = True) -> str:
        value = numbers.get(name)
        return f"{value:,.6g}" if value is not None else "not measured" if not is_measured else "-"

    return [
        cell("seconds"),
        cell("gpu_seconds"),
        cell("tokens"),
        cell("peak_memory_mib"),
        cell("peak_gpu_memory_mib"),
        cell("energy_wh", is_measured=False),
    ]
