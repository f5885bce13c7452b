"""Say how much memory and disk each step of a plan needs from the machine or the pod that runs it.

A step needs, beside its Python process, what its way of working needs: the gate holds the rows, the quantizer a few
tensors at a time, evaluation and merge one form of the model at a time, training what `memory_model` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from qlora_retrain.core import graph
from qlora_retrain.core.errors import Problem
from qlora_retrain.core.graph import Step
from qlora_retrain.lm import memory_model
from qlora_retrain.lm.adapter_scale import FULL
from qlora_retrain.lm.model_shape import UnknownShape
from qlora_retrain.pipeline import forecast, forecast_target
from qlora_retrain.pipeline.forecast import GIB, MemoryForecast, NotEstimated, Work
from qlora_retrain.pipeline.plan import Plan

# Python with torch and its libraries; with CUDA's, whose files and buffers are the host's, too.
_TORCH_BYTES, _CUDA_BYTES = GIB, 4 * GIB
# A row of the gate is its text several times: raw, as a chat, rendered, as tokens.
_GATE_BYTES, _GATE_FACTOR = GIB, 12
# Quantizing: the largest tensor as it is read, in fp32, in parts and packed; and the process.
_QUANTIZE_FACTOR = 4
# Measuring a form of the model, in the precision in which it is measured.
_FORM_FACTOR = 1.2
# By what a step makes, in multiples of the 16-bit model: what it reads and writes, candidates and exports included.
# The base is counted in 4 bits; what another format has more is added in each step that has it.
_COUNTED_BITS = 4.127
_DISK_FACTORS = {"base_nf4": 1.4, "adapter": 0.6, "evaluation": 2.6, "model": 6.0, "release": 3.0}


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a step should get.

    Attributes:
        step: Its name.
        memory_gib: GiB of memory.
        disk_gib: GiB of disk, beside the image.
        configured_gib: GiB of memory that the platform or the profile gives it, or at most gives it; None: no limit.
    """

    step: str
    memory_gib: int
    disk_gib: int
    configured_gib: float | None

    @property
    def is_too_small(self) -> bool:
        """Whether the step would probably be killed for memory."""
        return self.configured_gib is not None and self.configured_gib < self.memory_gib


def step_sizes(plan: Plan, work: Work, memory: MemoryForecast) -> Iterator[StepSize]:
    """Yield what each step should get, in whole GiB."""
    for step in graph.STEPS:
        memory_bytes = _memory_bytes(plan, step, work, memory)
        disk_bytes = _raw_bytes(plan) + _disk_factor(step, work) * 2 * work.shape.weights + GIB
        configured = forecast_target.configured_memory_gib(plan, step)
        yield StepSize(step.name, math.ceil(memory_bytes / GIB), math.ceil(disk_bytes / GIB), configured)


def _disk_factor(step: Step, work: Work) -> float:
    """Return what a step needs on disk, in multiples of the 16-bit model."""
    if step.makes == "adapter" and work.settings.method == FULL:
        # The base and the result; two checkpoints, and one that is written: weights, best weights, masters, states.
        return 2 + 3 * (2 + 2 + work.settings.optimizer_bits / 8)
    base_format = work.settings.base_format
    copies = sum(source.name == "base_nf4" for source in step.reads)
    if step.makes == "base_nf4":
        copies = 1 + base_format.is_packed  # packed tensors lie in mapped files before they are saved
    surplus_bits = max(0.0, base_format.bits_per_weight - _COUNTED_BITS) * work.shape.layer_weights / work.shape.weights
    return _DISK_FACTORS.get(step.makes, 0.1) + copies * surplus_bits / 16


def planned_sizes(plan: Plan) -> dict[str, StepSize]:
    """Return what each step of a plan should get, by its name.

    Raises:
        NotEstimated: If it cannot be estimated, or not yet.
    """
    try:
        work = forecast.load_work(plan)
        return {size.step: size for size in step_sizes(plan, work, forecast.forecast_memory(work))}
    except (UnknownShape, Problem) as reason:
        raise NotEstimated(str(reason)) from reason


def _memory_bytes(plan: Plan, step: Step, work: Work, memory: MemoryForecast) -> float:
    config = plan.step(step.name).config
    if step.makes == "dataset":
        return _GATE_BYTES + _GATE_FACTOR * _raw_bytes(plan)
    if step.makes == "base_nf4":
        return _TORCH_BYTES + _QUANTIZE_FACTOR * 2 * work.shape.largest_weights
    if step.makes == "adapter":
        return _train_bytes(work, memory)
    if step.makes == "evaluation" and config["device"] == "cuda":
        return _CUDA_BYTES
    if step.makes in ("evaluation", "model"):
        bytes_per_weight = 4 if config["precision"] == "float32" else 2
        return _TORCH_BYTES + _FORM_FACTOR * bytes_per_weight * work.shape.weights
    return GIB / 2


def _train_bytes(work: Work, memory: MemoryForecast) -> float:
    """Return the host's memory: all of it on a CPU, else that of the processes and of paged states."""
    if work.settings.device == "cpu":
        return memory.high * work.settings.num_processes
    base = memory_model.weight_bytes(work.shape, work.settings)
    return (_CUDA_BYTES + memory.parts.optimizer) * work.settings.num_processes + 0.2 * base


def _raw_bytes(plan: Plan) -> int:
    sources = [source for name in ("raw_data", "eval_data", "replay_data") if (source := plan.sources.get(name))]
    return sum(file.size_bytes for source in sources for file in source.content)
