"""Decide after each optimizer step whether to evaluate, to save and to stop; report speed, memory and progress."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from components.train_qlora import history
from components.train_qlora.batching import micro_batch_size
from components.train_qlora.processes import distributed
from components.train_qlora.training_run import TrainingRun
from qlora_retrain.core import progress, signals

# Progress is reported at least this often, however slow the steps.
REPORT_SECONDS = 10.0
# Half of the grace period after a stop request on one machine (`core.supervisor`).
SLOW_STEP_SECONDS = 30.0
BUDGET_USED_UP = "time budget used up; raise train.max_hours to continue"


@dataclass(slots=True)
class Due:
    """What is due after a step."""

    evaluate: bool = False
    save: bool = False
    stop: bool = False


class TrainingControl:
    """The clocks of an attempt, and what is due by them.

    Attributes:
        run: The run.
        stop_reason: Why the run stops before its last step, to be resumed later; None while it continues.
        tokens: The tokens since this process began, of all processes together, without padding.
        earlier_seconds: The training time of earlier attempts.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.stop_reason: str | None = None
        self.tokens = 0
        self.first_step = run.step
        self.earlier_seconds = history.training_seconds(run.log)
        self.has_warned = False
        self.begin()

    def begin(self) -> None:
        """Start the clocks."""
        # When each of these last happened, in seconds of the monotonic clock.
        self.train_begin = self.last_save = self.last_report = self.last_log = self.step_begin = time.monotonic()

    @property
    def tokens_per_second(self) -> float:
        """The speed of all processes together, since this process began to train."""
        return self.tokens / max(time.monotonic() - self.train_begin, 1e-9)

    def is_budget_used_up(self, seconds: float) -> bool:
        """Return whether this much training time is all that `max_hours` allows."""
        limit = self.run.config.max_hours
        return limit is not None and seconds >= limit * 3600

    def begin_step(self) -> None:
        """Start the step's clock."""
        self.step_begin = time.monotonic()

    def end_step(self) -> Due:
        """Return what is due: evaluations by the plan; a save by time, when asked to stop, and after the last step."""
        now, is_last = time.monotonic(), self.run.step >= self.run.total_steps
        self._warn_of_slow_step(now - self.step_begin)

        # Clocks and signals differ between processes, but all processes must decide the same.
        stop_requested, budget_used_up, save_due = distributed.all_reduce_any(
            signals.stop_requested(),
            self.is_budget_used_up(self.earlier_seconds + now - self.train_begin),
            now - self.last_save >= self.run.config.checkpoint_minutes * 60,
        )
        # After the last step the run ends anyway.
        if not is_last and (stop_requested or budget_used_up):
            self.stop_reason = "asked to stop" if stop_requested else BUDGET_USED_UP

        has_to_stop = self.stop_reason is not None
        due = Due(self.run.step in self.run.eval_at_steps, save_due or has_to_stop or is_last, has_to_stop or is_last)
        if due.save:
            self.last_save = now
        return due

    def step_metrics(self, tokens: int) -> dict[str, float]:
        """Return speed, memory and time of the step that just ended.

        Args:
            tokens: The tokens of the step, of all processes together.
        """
        now = time.monotonic()
        seconds, self.last_log = now - self.last_log, now
        self.tokens += tokens
        memory = round(distributed.all_reduce_sum(memory_mib(self.run.config.device))[0])
        return {
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "memory_mib": memory,
            "time": time.time(),
            # Smaller than the line's setting where memory ran out; a later attempt starts with it (`oom_retry`).
            "batch_size": micro_batch_size(self.run.config),
        }

    def report_progress(self, entry: dict[str, Any]) -> None:
        """Report progress every `log_every_steps` steps, after the last one, and whenever 10 s have passed.

        Args:
            entry: The step's entry in the log.
        """
        now, step, total_steps = time.monotonic(), self.run.step, self.run.total_steps
        is_overdue = now - self.last_report >= REPORT_SECONDS
        if step % self.run.config.log_every_steps and step < total_steps and not is_overdue:
            return
        self.last_report = now

        # Steps of earlier attempts say nothing about the speed of this machine.
        eta_seconds = (now - self.train_begin) / max(step - self.first_step, 1) * (total_steps - step)
        progress.update(
            "training",
            step,
            total_steps,
            loss=entry["loss"],
            learning_rate=entry["learning_rate"],
            tokens_per_second=self.tokens_per_second,
            eta_seconds=round(eta_seconds),
            memory_mib=entry["memory_mib"],
        )

    def _warn_of_slow_step(self, seconds: float) -> None:
        """Warn once where a step takes longer than a stop request can wait."""
        if seconds > SLOW_STEP_SECONDS and not self.has_warned:
            self.has_warned = True
            progress.say(
                f"one step takes {seconds:.0f} s, and a stop request waits for the end of the step before it saves. "
                "Give the pod or the worker a longer grace period than that, or lower train.global_batch_size"
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
