"""Hold the result of a training run, render its report, and write its curves as a TensorBoard event file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import html
from qlora_retrain.core.outcome import Number
from qlora_retrain.lm.adapter_scale import describe_adapter


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The numbers of a finished run; its adapter is on disk.

    Attributes:
        log: Every step and evaluation; `history` reads it.
        optimizer: A description of the optimizer that ran.
        eval_loss: Nats per supervised token of the evaluation rows; None where there are no such rows.
        tokens_per_second: The speed of all processes together; None where earlier attempts did every step.
        peak_rss_mib: The sum of the peaks of all training processes.
        layers: See `adapter.trainable_by_layer`.
        ranks: The rank of each layer, where the method chose them while it trained; else empty.
        train_rows: The number of training rows in the dataset.
        eval_rows: The number of evaluation rows in the dataset.
    """

    log: list[dict[str, Any]]
    optimizer: str
    eval_loss: float | None
    tokens_per_second: float | None
    peak_rss_mib: int
    layers: list[tuple[str, int, int]]
    ranks: dict[str, int]
    train_rows: int
    eval_rows: int


# More points than this cannot be distinguished on the page.
CURVE_POINTS = 400
# The library's default name contains the host and the time, which an artifact must not hold.
EVENT_FILE = "events.out.tfevents.0.train"


def report_page(
    config: TrainConfig,
    numbers: Mapping[str, Number],
    steps: Sequence[Mapping[str, Any]],
    eval_losses: Sequence[tuple[int, float]],
    timings: Sequence[Mapping[str, Any]],
    layers: Sequence[tuple[str, int, int]],
    ranks: Mapping[str, int],
    oom_messages: Sequence[str],
) -> str:
    """Render curves, numbers, settings and the trained layers as one self-contained page."""
    # The sentence at the top says how long the run was, how good it is, and which step's adapter was kept.
    eval_loss = numbers["eval_loss"]
    eval_clause = f"; the evaluation loss is {eval_loss:.4g}" if isinstance(eval_loss, float) else ""
    summary = (
        f"After {numbers['steps']} steps the training loss is {numbers['train_loss']:.4g} nats per token{eval_clause}."
    )
    if numbers["start"] == "champion":
        summary += " It went on from the adapter of the version in production."
    if numbers["resumed_at"]:
        summary += (
            f" {numbers['trained_steps']} of the steps were trained by the last attempt; the others, and their losses, "
            f"are what checkpoint-{numbers['resumed_at']} says."
        )
    if numbers["best_step"] is not None:
        summary += f" The adapter is that of step {numbers['best_step']}, where the evaluation loss was lowest."

    if config.alpha is not None:
        summary += f" The adapter has {describe_adapter(config.rank, config.alpha, config.method)}."

    # A curve without points is left out, and each setting is shown with the reason where the plan chose it.
    losses = {"training": _curve(steps, "loss"), "evaluation": [(float(step), loss) for step, loss in eval_losses]}
    fields = TrainConfig.model_fields
    settings = [
        (
            name,
            str(value),
            f"chosen by the plan: {config.reasons[name]}" if name in config.reasons else "",
            fields[name].description,
        )
        for name, value in config.model_dump().items()
    ]

    return html.page(
        "Training",
        summary,
        *oom_messages,
        html.section(
            "Loss",
            html.line_chart({k: v for k, v in losses.items() if v}, "step", "nats per supervised token"),
            html.line_chart({"gradient norm": _curve(steps, "grad_norm")}, "step", "gradient norm before clipping"),
            html.line_chart({"learning rate": _curve(steps, "learning_rate")}, "step", "learning rate"),
        ),
        html.section(
            "Machine",
            html.line_chart({"tokens/s": _curve(timings, "tokens_per_second")}, "step", "tokens per second"),
            html.line_chart({"memory": _curve(timings, "memory_mib")}, "step", "memory in MiB"),
        ),
        html.section("Numbers", html.key_value_table(numbers)),
        html.section("Trained layers", html.table(("layer", "number of layers", "parameters"), layers)),
        *(
            [html.section("Ranks", html.table(("layer", "rank that the method gave it"), ranks.items()))]
            if ranks
            else []
        ),
        html.section("Settings", html.table(("setting", "value", "why", "what it does"), settings)),
    )


def write_event_file(folder: Path, curves: Iterable[tuple[int, float, Mapping[str, float]]]) -> None:
    """Write one TensorBoard event for each (step, seconds since 1970, values by tag)."""
    # tensorboardX supplies the messages and checksums, without TensorBoard's web server.
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    # Every file starts with its version.
    writer = RecordWriter(str(folder / EVENT_FILE))
    writer.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())

    for step, wall_time, scalars in curves:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        writer.write(Event(wall_time=wall_time, step=step, summary=Summary(value=values)).SerializeToString())
    writer.close()


def _curve(entries: Sequence[Mapping[str, Any]], field: str) -> list[tuple[float, float]]:
    """Return (step, value), averaged over neighbours where there are more than `CURVE_POINTS` steps."""
    # Rounded up; `or 1` is for a run without entries.
    width = -(-len(entries) // CURVE_POINTS)
    groups = [entries[i : i + width] for i in range(0, len(entries), width or 1)]
    return [(float(g[-1]["step"]), sum(float(entry[field]) for entry in g) / len(g)) for g in groups]
