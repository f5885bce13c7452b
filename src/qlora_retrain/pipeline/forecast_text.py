"""Say in a few lines whether a plan's training fits, how long it takes, what it costs, and what its pods should get."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_retrain.core.errors import Problem
from qlora_retrain.lm.model_shape import UnknownShape
from qlora_retrain.pipeline import forecast, forecast_target, forecast_time, pod_sizes
from qlora_retrain.pipeline.forecast import GIB, MemoryForecast, NotEstimated, Target, Work
from qlora_retrain.pipeline.forecast_time import TimeForecast
from qlora_retrain.pipeline.plan import Plan

_CHANGES = {
    "micro_batch_size": "the same result",
    "gradient_checkpointing": "the same result, a third slower",
    "optimizer": "a little noise",
    "rank": "less capacity",
    "target_modules": "weaker",
}


def as_text(plan: Plan, *, gpu: str | None = None, has_parts: bool = False) -> str:
    """Return the lines for a person; where an estimate cannot be made, why.

    Args:
        plan: The plan.
        gpu: The name of a card to estimate for, instead of what the plan's training runs on.
        has_parts: Whether to add the parts of the memory.
    """
    # Nobody should have no plan because its memory cannot be estimated.
    try:
        return "\n".join(_lines(plan, forecast_target.card_name(plan, gpu), has_parts=has_parts))
    except (NotEstimated, UnknownShape, Problem) as reason:
        return f"memory, time and cost: not estimated: {reason}"


def _lines(plan: Plan, card: str | None, *, has_parts: bool) -> Iterator[str]:
    target = forecast_target.find_target(plan, card)
    work = forecast.load_work(plan, is_on_gpu=card is not None)
    memory = forecast.forecast_memory(work)
    yield f"memory: {_verdict(work, memory, target)}"
    if has_parts:
        yield from _parts(memory)
    try:
        time = forecast_time.forecast_time(work, target)
        yield f"time: {_duration(time)} of training, {time.source}"
        if work.settings.device == "cuda":
            yield f"cost: {_cost(time, target, work)}"
    except NotEstimated as reason:
        yield f"time: not estimated: {reason}"
    yield from _sizes(plan, work, memory)


def _verdict(work: Work, memory: MemoryForecast, target: Target) -> str:
    """Return whether it fits, in a sentence."""
    rows = f"micro-batches of {work.micro_batch_size} rows of up to {work.longest:,} tokens"
    runs = f"{memory.num_runs} earlier run{'s' * (memory.num_runs > 1)}"
    by = f"corrected by {runs}" if memory.num_runs else "by arithmetic"
    need = f"needs about {_gib(memory.likely)} GiB ({_gib(memory.low)} to {_gib(memory.high)}, {by}) with {rows}"
    if target.memory_bytes is None:
        return f"{need}; whether it fits is not said, for {target.label} is not known: name a card with --gpu"
    if memory.high <= target.memory_bytes:
        return f"fits {target.label}: {need}"

    is_hopeless = memory.low > target.memory_bytes
    verdict = f"does not fit {target.label}" if is_hopeless else f"may not fit {target.label}"
    change = forecast.fitting_change(work, target.memory_bytes)
    if change is None:
        return f"{verdict}: {need}; no smaller setting fits surely: choose a larger card, or shorter rows"
    settings = ", ".join(f"train.{name}: {value} ({_CHANGES[name]})" for name, value in change.items())
    return f"{verdict}: {need}; it fits with {settings}"


def _parts(memory: MemoryForecast) -> Iterator[str]:
    for name, size in memory.parts.parts().items():
        yield f"  {name:<12}{size / GIB:9.3f} GiB"
    yield f"  {'in all':<12}{memory.parts.total / GIB:9.3f} GiB allocated by torch at the peak, by arithmetic"


def _cost(time: TimeForecast, target: Target, work: Work) -> str:
    if target.price_per_hour is None:
        return f"not estimated: platform.yaml has no price of {target.label.split(' ')[0]} (gpus.NAME.price_per_hour)"
    per_second = target.price_per_hour * work.settings.num_processes / 3600
    low, likely, high = (per_second * seconds for seconds in (time.low, time.likely, time.high))
    return f"about {likely:.2g} ({low:.2g} to {high:.2g}) for the training, at {target.price_per_hour:g} a card an hour"


def _sizes(plan: Plan, work: Work, memory: MemoryForecast) -> Iterator[str]:
    sizes = list(pod_sizes.step_sizes(plan, work, memory))
    requests = ", ".join(f"{size.step} {size.memory_gib}" for size in sizes)
    yield f"memory of the steps' pods or processes, in GiB: {requests}; disk {max(size.disk_gib for size in sizes)}"
    for size in sizes:
        if size.is_too_small:
            yield f"warning: {size.step} gets {size.configured_gib:g} GiB and probably needs {size.memory_gib}"


def _duration(time: TimeForecast) -> str:
    return f"about {_seconds(time.likely)} ({_seconds(time.low)} to {_seconds(time.high)})"


def _seconds(seconds: float) -> str:
    """Return a duration with two digits: what an estimate has."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size < 100 * GIB else f"{size / GIB:.0f}"
