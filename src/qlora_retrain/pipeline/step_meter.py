"""Measure what a step costs while it runs: time, memory, and of GPUs the time, the memory and the energy.

The energy is that of the GPUs which the step uses, by NVIDIA's counters (the package nvidia-ml-py). Another process on
the same GPU is in it too. Without a GPU, or without the package, no energy is measured.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora_retrain.core.outcome import Number
from qlora_retrain.pipeline.cost import StepCost

_SAMPLE_SECONDS = 1.0
_MILLIJOULES_PER_WH = 3.6e6


class StepMeter:
    """A context around a step's work.

    Args:
        settings: The step's settings, which say whether it uses GPUs, and how many.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.seconds = 0.0
        processes = settings.get("num_processes") or 1
        self._gpus = _Gpus(processes) if settings.get("device") == "cuda" else None

    def __enter__(self) -> StepMeter:
        """Begin to measure."""
        if self._gpus:
            self._gpus.start()
        self._clock = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the measurement."""
        self.seconds = round(time.monotonic() - self._clock, 1)
        if self._gpus:
            self._gpus.stop()

    def cost(self, run_id: str, numbers: Mapping[str, Number]) -> StepCost:
        """Return what the step cost.

        Args:
            run_id: The run.
            numbers: What the step measured itself: tokens, and the memory of all its processes.
        """
        gpus = self._gpus.count if self._gpus else 0
        gpu_memory_mib = self._gpus.peak_memory_mib if self._gpus else None
        return StepCost(
            run_id=run_id,
            seconds=self.seconds,
            gpus=gpus,
            gpu_seconds=round(self.seconds * gpus, 1),
            tokens=_whole(numbers.get("tokens")),
            peak_memory_mib=max(_peak_memory_mib(), _whole(numbers.get("peak_rss_mib")) or 0),
            peak_gpu_memory_mib=_whole(numbers.get("peak_gpu_mib")) or gpu_memory_mib,
            energy_wh=self._gpus.energy_wh if self._gpus else None,
        )


class _Gpus:
    """The GPUs that a step uses, watched by a thread.

    Attributes:
        count: Their number.
        energy_wh: Their energy; None where it is not measured.
    """

    def __init__(self, processes: int) -> None:
        self.count = processes  # training takes one for each process, every other step takes one
        self.energy_wh: float | None = None
        self._used_bytes = 0
        self._power_millijoules, self._sampled_at = 0.0, 0.0
        self._counters: list[int] | None = None
        self._nvml, self._handles = _open(processes)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def peak_memory_mib(self) -> int | None:
        """What this process allocated by torch at most; else what was used on a GPU by all processes."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            allocated: int = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
            if allocated:
                return round(allocated / 2**20)
        return round(self._used_bytes / 2**20) or None

    def start(self) -> None:
        if self._handles:
            self._counters = self._energy_counters()
            self._sampled_at = time.monotonic()
            self._thread.start()

    def stop(self) -> None:
        if not self._handles:
            return
        self._stopped.set()
        self._thread.join()
        self._sample()
        counters = self._energy_counters()
        millijoules: float | None = self._power_millijoules or None
        if self._counters is not None and counters is not None:
            millijoules = sum(counters) - sum(self._counters)
        self.energy_wh = None if millijoules is None else round(millijoules / _MILLIJOULES_PER_WH, 3)
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _watch(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        """Look at the memory, and at the power, which counts where a GPU has no counter of energy."""
        now = time.monotonic()
        seconds, self._sampled_at = now - self._sampled_at, now
        for handle in self._handles:
            with contextlib.suppress(self._nvml.NVMLError):
                self._used_bytes = max(self._used_bytes, self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
                self._power_millijoules += self._nvml.nvmlDeviceGetPowerUsage(handle) * seconds

    def _energy_counters(self) -> list[int] | None:
        """Return what each GPU has used since its driver was loaded, in millijoules; None where one has no counter."""
        try:
            return [self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles]
        except self._nvml.NVMLError:
            return None


def _open(processes: int) -> tuple[Any, list[Any]]:
    """Return NVIDIA's library and the first of the visible GPUs, one for each process; none where it is not there."""
    if find_spec("pynvml") is None:
        return None, []
    nvml: Any = import_module("pynvml")
    try:
        nvml.nvmlInit()
        return nvml, list(_visible(nvml))[:processes]
    except nvml.NVMLError:
        return None, []


def _visible(nvml: Any) -> Iterator[Any]:
    """Yield the GPUs that CUDA shows to this process, in its order."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        yield from (nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount()))
        return
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name.isdigit():
            yield nvml.nvmlDeviceGetHandleByIndex(int(name))
        elif name.startswith("GPU-"):
            yield nvml.nvmlDeviceGetHandleByUUID(name)
        else:  # a part of a GPU, whose energy nobody counts; and CUDA ends its list at what is no device
            return


def _peak_memory_mib() -> int:
    """Return the peak of this process's memory, or of the largest one that it has started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    status = Path("/proc/self/status")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if status.is_file():
        # The other number begins with that of the process which started this one.
        lines = dict(line.split(":", 1) for line in status.read_text().split("\n") if ":" in line)
        own = int(lines.get("VmHWM", f"{own} kB").split()[0])
    return max(own, children) // 1024


def _whole(value: Number) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
