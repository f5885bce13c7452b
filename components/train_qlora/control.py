"""Decide after each optimizer step whether to evaluate, to save and to stop; report speed, memory and progress."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from components.train_qlora import distributed, history
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress, signals

# Progress is reported at least this often, however slow the steps.
REPORT_SECONDS = 10.0
# Half of the grace period after a stop request on one machine (`core.supervisor`).
SLOW_STEP_SECONDS = 30.0
BUDGET_USED_UP = "time budget used up; raise train.max_hours to continue"


class TrainingControl(TrainerCallback):  # type: ignore[misc]
    """Decide after each step whether to evaluate, save and stop; the Trainer calls it at each event.

    Attributes:
        total_steps: The optimizer steps of the whole run.
        eval_at_steps: The steps after which the run evaluates.
        stop_reason: Why the run stops before its last step, to be resumed later; None while it continues.
        tokens: The tokens since this process began, of all processes together, without padding.
        earlier_seconds: The training time of earlier attempts.
    """

    def __init__(self, config: TrainConfig, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        # Evenly spaced, the last one after the last step.
        num_evals = config.num_evals or 0
        self.eval_at_steps = {max(1, round(total_steps * (i + 1) / num_evals)) for i in range(num_evals)}
        self.stop_reason: str | None = None
        self.tokens = 0
        # When each of these last happened, in seconds of the monotonic clock.
        self.train_begin = self.last_save = self.last_report = self.last_log = self.step_begin = time.monotonic()
        self.first_step = 0
        self.earlier_seconds = 0.0
        self.has_warned = False

    @property
    def tokens_per_second(self) -> float:
        """The speed of all processes together, since this process began to train."""
        return self.tokens / max(time.monotonic() - self.train_begin, 1e-9)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clocks."""
        self.train_begin = self.last_save = self.last_report = self.last_log = time.monotonic()
        self.first_step = state.global_step
        self.earlier_seconds = history.training_seconds(state.log_history)

    def is_budget_used_up(self, seconds: float) -> bool:
        """Return whether this much training time is all that `max_hours` allows."""
        limit = self.config.max_hours
        return limit is not None and seconds >= limit * 3600

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the step's clock."""
        self.step_begin = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate when it is due; save when it is due, when asked to stop, and after the last step."""
        now = time.monotonic()
        self._warn_of_slow_step(now - self.step_begin)
        control.should_evaluate = state.global_step in self.eval_at_steps

        # Clocks and signals differ between processes, but all processes must decide the same.
        stop_requested, budget_used_up, save_due = distributed.all_reduce_any(
            signals.stop_requested(),
            self.is_budget_used_up(self.earlier_seconds + now - self.train_begin),
            now - self.last_save >= self.config.checkpoint_minutes * 60,
        )
        # After the last step the run ends anyway.
        if state.global_step < self.total_steps:
            if stop_requested:
                self.stop_reason = "asked to stop"
            elif budget_used_up:
                self.stop_reason = BUDGET_USED_UP

        if save_due or self.stop_reason or state.global_step >= self.total_steps:
            control.should_save = True
            self.last_save = now
        control.should_training_stop = control.should_training_stop or self.stop_reason is not None

    def step_metrics(self, tokens: int) -> dict[str, float]:
        """Return speed, memory and time of the step that just ended.

        Args:
            tokens: The tokens of the step, of all processes together.
        """
        now = time.monotonic()
        seconds, self.last_log = now - self.last_log, now
        self.tokens += tokens
        memory = round(distributed.all_reduce_sum(memory_mib(self.config.device))[0])
        return {
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "memory_mib": memory,
            "time": time.time(),
            # Smaller than the line's setting where memory ran out; a later attempt starts with it (`oom_retry`).
            "batch_size": self.config.micro_batch_size,
        }

    def _warn_of_slow_step(self, seconds: float) -> None:
        """Warn once where a step takes longer than a stop request can wait."""
        if seconds > SLOW_STEP_SECONDS and not self.has_warned:
            self.has_warned = True
            progress.say(
                f"one step takes {seconds:.0f} s, and a stop request waits for the end of the step before it saves. "
                "Give the pod or the worker a longer grace period than that, or lower train.global_batch_size"
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Report progress every `log_every_steps` steps, after the last one, and whenever 10 s have passed."""
        # The Trainer also logs evaluations and its own summary.
        if "loss" not in logs:
            return
        now, step = time.monotonic(), state.global_step
        is_overdue = now - self.last_report >= REPORT_SECONDS
        if step % self.config.log_every_steps == 0 or step >= self.total_steps or is_overdue:
            self.last_report = now

            # Steps of earlier attempts say nothing about the speed of this machine.
            eta_seconds = (now - self.train_begin) / max(step - self.first_step, 1) * (self.total_steps - step)
            progress.update(
                "training",
                step,
                self.total_steps,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                tokens_per_second=self.tokens_per_second,
                eta_seconds=round(eta_seconds),
                memory_mib=logs["memory_mib"],
            )


def memory_mib(device: str) -> int:
    """Return the memory of this process in MiB: on a GPU the peak since the last call, on a CPU its present size."""
    if device == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return int(peak_bytes) // 2**20
    # The second field is the resident set, in pages.
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 (not a path of a person)
        resident_pages = int(file.read().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE") // 2**20
