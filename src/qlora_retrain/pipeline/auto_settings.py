"""Replace every `auto` by a value: once, when the plan is made, and recorded there with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from qlora_retrain.config.fields import Section
from qlora_retrain.config.line import LineConfig
from qlora_retrain.config.methods import METHODS
from qlora_retrain.config.quantize import AdapterStart
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm.adapter_scale import default_alpha, describe_adapter, has_scale
from qlora_retrain.lm.warmup import DEFAULT_WARMUP_RATIO

_NVIDIA = Path("/proc/driver/nvidia/version")
_CPU = Path("/proc/cpuinfo")
# LoftQ's as in the experiments of arXiv 2310.08659. LQ-LoRA's error falls by less than 1 % a round after 10.
DEFAULT_ITERATIONS = {"loftq": 5, "lq-lora": 10}
# CPUs with one of these (Intel's tiles, Arm's BF16) multiply bf16 matrices faster than fp32 in torch. AVX-512 alone is
# not enough: with its bf16 instructions a product takes 1.8 times as long as in fp32, and without them 10 times.
_BF16_FLAGS = ("amx_bf16", "bf16")


class Choice(BaseModel):
    """One automatic choice."""

    model_config = ConfigDict(frozen=True)
    field: str
    value: str
    reason: str


def resolve_auto_settings(config: LineConfig) -> tuple[dict[str, Section], tuple[Choice, ...]]:
    """Return every section without any `auto`, by name, and the choices that were made.

    Raises:
        UsageError: If a setting contradicts an automatic choice, as liger kernels and a CPU do, or if the data gate
            would let data through that a later gate surely refuses.
    """
    sections = {step.section: config.section(step.section) for step in graph.STEPS}
    choices: list[Choice] = []

    def choose(section: str, name: str, value: str | float, reason: str) -> None:
        choices.append(Choice(field=f"{section}.{name}", value=str(value), reason=reason))
        sections[section] = sections[section].model_copy(update={name: value})

    # The same seed in every run keeps each row on its side of the split.
    if config.data.split_seed is None:
        choose("data", "split_seed", config.line, "not set: the line's name")
    for name, value, reason in _evidence(config):
        choose("data", name, value, reason)

    # The recipe of a version has the field, and is a line's file as it is.
    ships_model = "model" in config.publish.parts
    if "ships_model" in config.merge.model_fields_set and config.merge.ships_model != ships_model:
        raise UsageError("merge.ships_model: the plan sets it by publish.parts; leave it out")
    sections["merge"] = sections["merge"].model_copy(update={"ships_model": ships_model})

    train = config.train
    rate = METHODS[train.method].learning_rate
    if "learning_rate" not in train.model_fields_set and rate != train.learning_rate:
        choose("train", "learning_rate", rate, f"not set: it suits train.method: {train.method}")
    if train.alpha is None and has_scale(train.method):
        alpha = default_alpha(train.rank, train.method)
        choose("train", "alpha", alpha, f"not set: {describe_adapter(train.rank, alpha, train.method)}")

    if train.method in ("lora-xs", "loftq", "lq-lora"):
        start = AdapterStart(
            method=train.method,
            rank=train.rank,
            target_modules=train.target_modules,
            iterations=train.loftq_iterations or DEFAULT_ITERATIONS.get(train.method, 1),
        )
        sections["quantize"] = sections["quantize"].model_copy(update={"adapter_start": start})
    elif config.quantize.adapter_start is not None:
        raise UsageError("quantize.adapter_start: the plan sets it by train.method; leave it out")

    if train.warmup_ratio is None and train.warmup_steps is None:
        choose("train", "warmup_ratio", DEFAULT_WARMUP_RATIO, "not set: the rate rises in this fraction of the steps")

    # The device first, because the other choices depend on it.
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
            raise UsageError(f"{name}.kernels: liger needs {name}.device: cuda, and it is {device}; set kernels: auto")
    return sections, tuple(choices)


def _evidence(config: LineConfig) -> Iterator[tuple[str, int, str]]:
    """Yield how many prompts the data gate must ask for, so that data which passes is not refused after training."""
    data, evaluate, merge = config.data, config.evaluate, config.merge
    # Where something is measured on half of the rows, two halves are needed; `auto` needs one.
    merge_prompts = {"measured": 2 * merge.min_prompts, "auto": merge.min_prompts}.get(merge.base, 0)
    merge_prompts = 2 * merge.min_prompts if merge.rank == "smallest" else merge_prompts
    needed = max(evaluate.min_prompts, merge_prompts)
    setting = "evaluate.min_prompts" if needed == evaluate.min_prompts else "merge.min_prompts"
    if "min_eval_prompts" not in data.model_fields_set:
        if needed != data.min_eval_prompts:
            yield "min_eval_prompts", needed, f"not set: what {setting} needs"
    elif data.min_eval_prompts < needed:
        raise UsageError(
            f"data.min_eval_prompts: {data.min_eval_prompts} lets data pass that is refused after training, since "
            f"{setting} needs evaluation rows of {needed} different prompts; leave it out, or lower {setting} too"
        )

    if config.sources.golden_data is not None and "min_golden_prompts" not in data.model_fields_set:
        yield "min_golden_prompts", evaluate.min_golden_prompts, "not set: what evaluate.min_golden_prompts needs"


def _device() -> tuple[str, str]:
    if _NVIDIA.exists():
        return "cuda", "an NVIDIA driver is loaded where the plan was made"
    return "cpu", "no NVIDIA driver where the plan was made"


def _precision(section: str, device: str) -> tuple[str, str]:
    if device == "cuda":
        return "bfloat16", "cuda has bf16 arithmetic"
    # Training may use the faster type of this CPU, but a verdict must not depend on the CPU.
    if section != "train":
        return "float32", "on every CPU, so that no verdict depends on the machine"
    flags = set(_CPU.read_text().split()) if _CPU.exists() else set()
    if fast_flags := [flag for flag in _BF16_FLAGS if flag in flags]:
        return "bfloat16", f"this CPU has {fast_flags[0]}, with which torch multiplies bf16 matrices fast"
    return "float32", "this CPU multiplies bf16 matrices more slowly than float32, which holds the same weights"


def _attention(device: str) -> tuple[str, str]:
    if device == "cpu":
        return "eager", "faster than sdpa on short rows on a CPU"
    return "sdpa", "available on every CUDA device"


def _kernels(device: str) -> tuple[str, str]:
    if device == "cpu":
        return "torch", "Triton's kernels are for GPUs"
    if find_spec("liger_kernel") is None:
        return "torch", "liger-kernel is not installed where the plan was made"
    return "liger", "liger-kernel is installed where the plan was made"
