"""What is said about a training run: the optimizer that was really used, and the page for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import html
from qlora_retrain.core.outcome import Number


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run learned, beside the adapter that it wrote.

    Attributes:
        log: The Trainer's, see `history`.
        optimizer: As it ran.
        eval_loss: Nats a supervised token of the evaluation rows; None where there are none.
        tokens_per_second: Of all processes together; None where every step was done before.
        peak_rss_mib: The peaks of all processes that train, added up.
        layers: See `lora.trainable_by_layer`.
        train_rows: Rows of the data set.
        eval_rows: Likewise.
    """

    log: list[dict[str, Any]]
    optimizer: str
    eval_loss: float | None
    tokens_per_second: float | None
    peak_rss_mib: int
    layers: list[tuple[str, int, int]]
    train_rows: int
    eval_rows: int


CURVE_POINTS = 400  # more cannot be seen on a page


def optimizer_used(config: TrainConfig, optimizer: Any) -> str:
    """The optimizer as it ran: on a CPU never paged, on a GPU by what its state tensors are."""
    name = config.optimizer.removeprefix("paged_")
    if config.device != "cuda":
        return f"{name}, not paged: bitsandbytes pages nothing on a CPU ({config.optimizer} was asked for)"
    states = optimizer.state.values() if optimizer is not None else ()  # none: every step was done before a restart
    tensors = [tensor for state in states for tensor in state.values() if hasattr(tensor, "is_cuda")]
    paged = sum(1 for tensor in tensors if getattr(tensor, "is_paged", False))
    return f"{config.optimizer}, {paged} of {len(tensors)} state tensors paged (the small ones never are)"


def report_page(
    config: TrainConfig,
    numbers: Mapping[str, Number],
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[tuple[int, float]],
    timings: Sequence[Mapping[str, Any]],
    layers: Sequence[tuple[str, int, int]],
    halvings: Sequence[str],
) -> str:
    """Curves, numbers, settings and what was trained, as one self-contained page."""
    eval_loss = numbers["eval_loss"]
    measured = f", {eval_loss:.4g} on the evaluation rows" if isinstance(eval_loss, float) else ""
    sentence = f"{numbers['steps']} steps; the loss ended at {numbers['train_loss']:.4g} nats a token{measured}."
    if numbers["best_step"] is not None:
        sentence += f" The adapter is that of step {numbers['best_step']}, the best measured."
    losses = {"training": _curve(steps, "loss"), "evaluation": [(float(step), loss) for step, loss in evaluations]}
    fields = TrainConfig.model_fields
    settings = [
        (
            name,
            str(value),
            f"chosen: {config.reasons[name]}" if name in config.reasons else "",
            fields[name].description,
        )
        for name, value in config.model_dump().items()
    ]
    return html.page(
        "Training",
        sentence,
        *halvings,
        html.section(
            "Loss",
            html.line_chart({k: v for k, v in losses.items() if v}, "step", "nats a supervised token"),
            html.line_chart({"gradient norm": _curve(steps, "grad_norm")}, "step", "gradient norm before clipping"),
            html.line_chart({"learning rate": _curve(steps, "learning_rate")}, "step", "learning rate"),
        ),
        html.section(
            "Machine",
            html.line_chart({"tokens/s": _curve(timings, "tokens_per_second")}, "step", "tokens a second"),
            html.line_chart({"memory": _curve(timings, "memory_mib")}, "step", "memory in MiB"),
        ),
        html.section("Numbers", html.numbers(numbers)),
        html.section("Trained", html.table(("layer", "how many", "parameters"), layers)),
        html.section("Settings", html.table(("setting", "value", "why", "what it does"), settings)),
    )


def _curve(steps: Sequence[Mapping[str, Any]], what: str) -> list[tuple[float, float]]:
    """(step, value), averaged over neighbours where there are more steps than can be seen."""
    width = -(-len(steps) // CURVE_POINTS)
    groups = [steps[i : i + width] for i in range(0, len(steps), width or 1)]
    return [(float(g[-1]["step"]), sum(float(entry[what]) for entry in g) / len(g)) for g in groups]
