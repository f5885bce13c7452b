"""What a step costs is measured around it, by NVIDIA's counters where there are any, and travels with manifests."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core.errors import Cause, TryAgain
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import cost, execute, step_meter
from qlora_retrain.pipeline.cost import StepCost
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.pipeline.step_meter import StepMeter
from qlora_retrain.storage import artifact
from qlora_retrain.storage.store import Store

# The calls of nvidia-ml-py that are used, over two GPUs whose counters the test turns.
NVML = """
class NVMLError(Exception):
    pass

energy = {0: 1_000, 1: 2_000, 2: 50}
used = {0: 2**30, 1: 3 * 2**30, 2: 2**40}
has_counter = True
power_milliwatts = 300_000
is_open = False

class Memory:
    def __init__(self, used):
        self.used = used

def nvmlInit():
    global is_open
    is_open = True

def nvmlShutdown():
    global is_open
    is_open = False

def nvmlDeviceGetCount():
    return len(energy)

def nvmlDeviceGetHandleByIndex(i):
    if i not in energy:
        raise NVMLError(i)
    return i

def nvmlDeviceGetHandleByUUID(uuid):
    return int(uuid.removeprefix("GPU-"))

def nvmlDeviceGetMemoryInfo(handle):
    return Memory(used[handle])

def nvmlDeviceGetPowerUsage(handle):
    return power_milliwatts

def nvmlDeviceGetTotalEnergyConsumption(handle):
    if not has_counter:
        raise NVMLError("not supported")
    return energy[handle]
"""


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for NVIDIA's library, since no machine of the tests has a GPU."""
    (tmp_path / "nvml").mkdir()
    (tmp_path / "nvml/pynvml.py").write_text(NVML)
    monkeypatch.syspath_prepend(str(tmp_path / "nvml"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    import importlib
    import sys

    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    yield importlib.import_module("pynvml")
    sys.modules.pop("pynvml", None)


def test_the_energy_of_the_gpus_of_a_step_is_what_their_counters_gained(nvml: Any) -> None:
    with StepMeter({"device": "cuda", "num_processes": 2}) as meter:
        for gpu, millijoules in ((0, 3_600_000), (1, 1_800_000), (2, 999_999_999)):
            nvml.energy[gpu] += millijoules
    measured = meter.cost("r", {"tokens": 70, "peak_gpu_mib": None})
    assert (measured.gpus, measured.energy_wh, measured.tokens) == (2, 1.5, 70)
    assert measured.gpu_seconds == measured.seconds * 2
    assert measured.peak_gpu_memory_mib == 3 * 1024  # of all processes on the fuller one
    assert not nvml.is_open


def test_without_counters_the_power_is_added_over_the_time(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.has_counter = False
    monkeypatch.setattr(step_meter, "_SAMPLE_SECONDS", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,0")
    before = time.monotonic()
    with StepMeter({"device": "cuda"}) as meter:
        begin = time.monotonic()
        time.sleep(0.3)
        seconds_inside = time.monotonic() - begin
    seconds_outside = time.monotonic() - before
    # 300 W over a time that lies between the two, rounded to 0.001 Wh.
    energy_wh = meter.cost("r", {}).energy_wh
    assert energy_wh is not None
    assert 300 * seconds_inside / 3600 - 0.0005 <= energy_wh <= 300 * seconds_outside / 3600 + 0.0005


@pytest.mark.parametrize("devices", ["", "-1", "MIG-1", "7"])
def test_where_no_gpu_can_be_counted_no_energy_is_measured(
    nvml: Any, monkeypatch: pytest.MonkeyPatch, devices: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    with StepMeter({"device": "cuda"}) as meter:
        pass
    assert meter.cost("r", {}).energy_wh is None


def test_a_step_on_a_cpu_uses_no_gpu_and_measures_no_energy() -> None:
    with StepMeter({"device": "cpu", "num_processes": 2}) as meter:
        pass
    measured = meter.cost("r", {"peak_rss_mib": 10**6})
    assert (measured.gpus, measured.gpu_seconds, measured.energy_wh) == (0, 0.0, None)
    assert measured.peak_memory_mib == 10**6  # what the step says of all its processes


def test_sums_say_what_was_not_measured() -> None:
    small = StepCost(run_id="a", seconds=1.5)
    large = StepCost(run_id="b", seconds=2.0, gpus=1, gpu_seconds=2.0, tokens=7, peak_memory_mib=9, energy_wh=0.25)
    assert cost.total([small]) == {
        "seconds": 1.5, "gpu_seconds": 0.0, "tokens": None, "peak_memory_mib": None, "peak_gpu_memory_mib": None,
        "energy_wh": None,
    }  # fmt: skip
    both = cost.total([small, large])
    assert (both["seconds"], both["tokens"], both["peak_memory_mib"], both["energy_wh"]) == (3.5, 7, 9, 0.25)


def test_an_interrupted_attempt_is_counted_with_the_one_that_ends(
    made_plan: Plan, small_steps: dict[str, Callable[..., StepResult]], store: Store
) -> None:
    plain = small_steps["train_qlora"]

    @functools.wraps(plain)
    def interrupted(**arguments: Any) -> StepResult:
        time.sleep(0.3)
        raise TryAgain("preempted", cause=Cause.CONFLICT)

    for name in ("validate_data", "quantize_model"):
        assert execute.run_step(made_plan, name, lambda name=name: small_steps[name]).code == 0  # type: ignore[misc]
    for _ in range(2):
        assert execute.run_step(made_plan, "train_qlora", lambda: interrupted).code == 75
    # Scratch is not signed: what somebody puts there must not stop a step.
    key = made_plan.step("train_qlora").key
    store.write_if_absent(f"scratch/train_qlora/{key}/other/cost.json", b"[" * 10**5)
    assert execute.run_step(made_plan, "train_qlora", lambda: plain).code == 0

    manifest = artifact.find_manifest(store, "adapter", key)
    assert manifest is not None
    costs = cost.read([manifest])
    assert list(costs) == ["validate_data", "quantize_model", "train_qlora"]
    assert costs["train_qlora"].attempts == 3
    assert costs["train_qlora"].seconds >= 0.6
    assert list(store.list(f"scratch/train_qlora/{key}")) == []


def test_a_manifest_of_an_older_release_has_no_cost(
    made_plan: Plan, small_steps: dict[str, Callable[..., StepResult]], store: Store
) -> None:
    assert execute.run_step(made_plan, "validate_data", lambda: small_steps["validate_data"]).code == 0
    manifest = artifact.find_manifest(store, "dataset", made_plan.step("validate_data").key)
    assert manifest is not None
    for provenance in ({}, {"costs": None}, {"costs": {"validate_data": {"seconds": "long"}}}, {"costs": [1]}):
        assert cost.read([manifest.model_copy(update={"provenance": provenance})]) == {}
