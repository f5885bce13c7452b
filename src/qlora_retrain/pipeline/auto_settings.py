"""What `auto` becomes: decided once, when the plan is made, and written down with the reason."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from qlora_retrain.config.fields import Section
from qlora_retrain.config.line import LineConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError

_NVIDIA = Path("/proc/driver/nvidia/version")
_CPU = Path("/proc/cpuinfo")
_BF16_FLAGS = ("avx512f", "amx_bf16", "bf16")  # where torch multiplies bf16 matrices at full speed


class Choice(BaseModel):
    """One automatic choice."""

    model_config = ConfigDict(frozen=True)
    field: str
    value: str
    reason: str


def resolved(config: LineConfig) -> tuple[dict[str, Section], tuple[Choice, ...]]:
    """Every section with nothing left to choose, by its name, and the choices that were made.

    Raises:
        UsageError: If what was set cannot be had together with what was chosen.
    """
    sections = {step.section: config.section(step.section) for step in graph.STEPS}
    choices: list[Choice] = []

    def choose(section: str, name: str, value: str, reason: str) -> None:
        choices.append(Choice(field=f"{section}.{name}", value=value, reason=reason))
        sections[section] = sections[section].model_copy(update={name: value})

    if config.data.salt is None:
        choose("data", "salt", config.line, "not set: the line's name")
    for name, section in list(sections.items()):
        fields = section.model_dump()
        if fields.get("device") == "auto":
            choose(name, "device", *_device())
        device = sections[name].model_dump().get("device", "cpu")
        if fields.get("precision") == "auto":
            choose(name, "precision", *_precision(name, device))
        if fields.get("attention") == "auto":
            choose(name, "attention", *_attention(device))
        if fields.get("kernels") == "auto":
            choose(name, "kernels", *_kernels(device))
        if fields.get("kernels") == "liger" and device != "cuda":
            raise UsageError(f"{name}.kernels: liger needs {name}.device: cuda, and it is {device}; leave it out")
    return sections, tuple(choices)


def _device() -> tuple[str, str]:
    if _NVIDIA.exists():
        return "cuda", "an NVIDIA driver is loaded where the plan was made"
    return "cpu", "no NVIDIA driver where the plan was made"


def _precision(section: str, device: str) -> tuple[str, str]:
    if device == "cuda":
        return "bfloat16", "cuda has bf16 arithmetic"
    if section != "train":
        return "float32", "on a CPU, so that no verdict depends on which one it was"
    flags = set(_CPU.read_text().split()) if _CPU.exists() else set()
    if found := [flag for flag in _BF16_FLAGS if flag in flags]:
        return "bfloat16", f"this CPU has {found[0]}, with which torch multiplies bf16 matrices fast"
    return "float32", "this CPU multiplies bf16 matrices slowly: float32 is 10 times faster and holds the same weights"


def _attention(device: str) -> tuple[str, str]:
    if device == "cpu":
        return "eager", "faster than sdpa on short rows on a CPU"
    return "sdpa", "always there on cuda"


def _kernels(device: str) -> tuple[str, str]:
    if device == "cpu":
        return "torch", "Triton's kernels are for GPUs"
    if find_spec("liger_kernel") is None:
        return "torch", "liger-kernel is not installed where the plan was made"
    return "liger", "liger-kernel is installed where the plan was made"
