"""What is decided between two steps: whether to measure, to save, to stop; and what is told about the work."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from components.train_qlora import history, ranks
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress, signals

TELL_SECONDS = 10.0
LONG_SECONDS = 30.0  # half of the grace that a step is given on one machine (`runtimes.leash`)
USED_UP = "time budget used up; to go on raise train.max_hours"


class Watch(TrainerCallback):  # type: ignore[misc]
    """Decides after each step whether to measure, save and stop, and tells how far the work is.

    Attributes:
        stopped: Why the run ends before its last step and goes on another time; None while it does not.
        tokens: Since this process began, of all that train together, padding not counted.
    """

    def __init__(self, config: TrainConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        times = config.evaluations or 0
        self.measure_at = {max(1, round(steps * (i + 1) / times)) for i in range(times)}
        self.stopped: str | None = None
        self.tokens = 0
        self.begun = self.saved = self.told = self.last_step = self.step_begun = time.monotonic()
        self.first = 0
        self.spent = 0.0  # seconds, by the tries before
        self.warned = False

    @property
    def tokens_per_second(self) -> float:
        """Of all processes, over the time since they began to train."""
        return self.tokens / max(time.monotonic() - self.begun, 1e-9)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clocks."""
        self.begun = self.saved = self.told = self.last_step = time.monotonic()
        self.first = state.global_step
        self.spent = history.seconds(state.log_history)

    def used_up(self, seconds: float) -> bool:
        """Whether so much work is all that the time budget allows."""
        limit = self.config.max_hours
        return limit is not None and seconds >= limit * 3600

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the step's clock."""
        self.step_begun = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure when it is due; save when it is time to, when asked to stop, and at the end."""
        now = time.monotonic()
        self._too_long_to_wait_for(now - self.step_begun)
        control.should_evaluate = state.global_step in self.measure_at
        asked, late, due = ranks.any_of(
            signals.requested(),
            self.used_up(self.spent + now - self.begun),
            now - self.saved >= self.config.checkpoint_minutes * 60,
        )
        if state.global_step < self.steps:
            if asked:
                self.stopped = "asked to stop"
            elif late:
                self.stopped = USED_UP
        if due or self.stopped or state.global_step >= self.steps:
            control.should_save = True
            self.saved = now
        control.should_training_stop = control.should_training_stop or self.stopped is not None

    def measured(self, tokens: int) -> dict[str, float]:
        """The speed of the step that just ended, the memory and the time now."""
        now = time.monotonic()
        seconds, self.last_step = now - self.last_step, now
        self.tokens += tokens
        memory = round(ranks.summed(memory_mib(self.config.device))[0])
        return {
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "memory_mib": memory,
            "time": time.time(),
            "batch_size": self.config.batch_size,  # less than was asked for where memory ran out
        }

    def _too_long_to_wait_for(self, seconds: float) -> None:
        """Say once that a step takes longer than whoever stops the run may wait."""
        if seconds > LONG_SECONDS and not self.warned:
            self.warned = True
            progress.say(
                f"a step takes {seconds:.0f} s, and a stop waits for its end before it saves: give the pod or the "
                "worker a longer grace than that, or a smaller batch_size * gradient_accumulation"
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Tell now and then."""
        if "loss" not in logs:
            return
        now, step = time.monotonic(), state.global_step
        late = now - self.told >= TELL_SECONDS  # a slow machine tells by time
        if step % self.config.log_every_steps == 0 or step >= self.steps or late:
            self.told = now
            left = (now - self.begun) / max(step - self.first, 1) * (self.steps - step)
            progress.update(
                "training",
                step,
                self.steps,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                tokens_per_second=self.tokens_per_second,
                eta_seconds=round(left),
                memory_mib=logs["memory_mib"],
            )


def memory_mib(device: str) -> int:
    """What the run holds: on a GPU the most since this was last asked, on a CPU what this process holds now."""
    if device == "cuda":
        held = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return int(held) // 2**20
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 (not a path of a person)
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20
