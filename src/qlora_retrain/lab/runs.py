"""Run the plans of a lab, each as `qlora-retrain run` in a process of its own, with one line of progress for each."""

from __future__ import annotations

import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_retrain.core import graph, supervisor
from qlora_retrain.core.errors import Exit, describe
from qlora_retrain.pipeline import run_endings, status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes import local
from qlora_retrain.storage import open_store

# The run itself gives its steps a minute to save their work.
_GRACE_SECONDS = 75.0
_POLL_SECONDS = 0.1
# Between two lines about a run whose progress has changed.
_PRINT_SECONDS = 10.0
_LINE_CHARACTERS = 300
# The end of an evaluation during training, as a run prints it.
_EVALUATION = re.compile(r"eval loss (?P<done>\d+)/(?P=done)  eval_loss (?P<loss>[0-9.e+-]+|nan|inf)")


@dataclass(frozen=True, slots=True)
class Job:
    """A plan to run.

    Attributes:
        label: Names it in the progress.
        plan: The plan.
        until: The last step.
        counts_refusal: Whether the job is done where its last step refuses: then it has measured what it was to.
        is_hopeless: Is called with each evaluation loss of the training; where it returns true, the run is stopped.
    """

    label: str
    plan: Plan
    until: str
    counts_refusal: bool = False
    is_hopeless: Callable[[float], bool] | None = None

    @property
    def key(self) -> str:
        """The key of the artifact that the last step makes."""
        return self.plan.step(self.until).key


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: an exit code, what the step that ended it says, and whether it was stopped as hopeless."""

    code: int
    message: str
    is_stopped: bool = False


class Interrupted(Exception):
    """Somebody stopped the lab; its steps were stopped too, and have saved what they can."""


def run_jobs(jobs: Sequence[Job], parallel: int, logs: Path) -> list[Outcome]:
    """Run every job, so many at once, and return how each ended, in their order; one that fails stops no other.

    Raises:
        Interrupted: After Ctrl-C or SIGTERM, once all steps have ended.
    """
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)
    logs.mkdir(parents=True, exist_ok=True)
    batch = _Batch(jobs, parallel, logs)
    try:
        while len(batch.outcomes) < len(jobs):
            batch.start_ready()
            batch.reap_ended()
            time.sleep(_POLL_SECONDS)
        return [batch.outcomes[number] for number in range(len(jobs))]

    except KeyboardInterrupt:
        print("stopping: running steps save their work; the same command goes on", file=sys.stderr, flush=True)
        raise Interrupted from None

    finally:
        # Signal all of them before waiting for any, so that their grace periods run at the same time.
        for run in batch.running.values():
            run.process.terminate()  # the supervisor passes it on, once
        for run in batch.running.values():
            run.process.wait()


class _Batch:
    """Jobs with their numbers: those that wait, those that run, and how the others ended."""

    def __init__(self, jobs: Sequence[Job], parallel: int, logs: Path) -> None:
        self._jobs, self._parallel, self._logs = jobs, parallel, logs
        self._waiting = dict(enumerate(jobs))
        self._has_changed = True  # since jobs were last looked at that might start
        self.running: dict[int, _Run] = {}
        self.outcomes: dict[int, Outcome] = {}

    def start_ready(self) -> None:
        """Start the jobs for which there is room, in their order; one that is complete ends at once."""
        if not self._has_changed:
            return
        self._has_changed = False
        for number, job in list(self._waiting.items()):
            if len(self.running) == self._parallel:
                break
            if (code := _completed_code(job)) is not None:
                self._end(number, _outcome(job, code), "done before")
                continue
            # Two runs that miss the same artifact would both make it.
            missing = _missing_keys(job)
            if all(missing.isdisjoint(run.missing_keys) for run in self.running.values()):
                self.running[number] = _Run(job, missing, self._logs / _log_name(job))
                del self._waiting[number]
                _say(number, self._jobs, "begins")

    def reap_ended(self) -> None:
        """Print the progress of the jobs that run, and take those out that have ended."""
        for number, run in list(self.running.items()):
            run.print_progress(number, self._jobs)
            run.stop_if_hopeless()
            if (code := run.process.poll()) is not None:
                run.reader.join()
                del self.running[number]
                stopped = Outcome(
                    int(Exit.TRY_AGAIN), "stopped: its evaluation loss was behind that of other runs", is_stopped=True
                )
                self._end(number, stopped if run.is_stopped else _outcome(run.job, code), "done")

    def _end(self, number: int, outcome: Outcome, text: str) -> None:
        self._waiting.pop(number, None)
        self.outcomes[number], self._has_changed = outcome, True
        _say(number, self._jobs, outcome.message or text)


class _Run:
    """A running job; its output goes to a file, and its last line is its progress."""

    def __init__(self, job: Job, missing_keys: frozenset[str], log: Path) -> None:
        self.job, self.missing_keys = job, missing_keys
        self._last_line, self._printed_line, self._printed_at = "", "", time.monotonic()
        self._eval_losses: queue.SimpleQueue[float] = queue.SimpleQueue()
        self.is_stopped = False
        command = [sys.executable, "-m", "qlora_retrain.cli", "run", "--plan", job.plan.uri, "--until", job.until]
        self.process = subprocess.Popen(
            supervisor.supervised_command(command, grace_seconds=_GRACE_SECONDS),
            env=local.step_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C must not reach it directly: `run_jobs` passes it on, once
        )
        # Read in a thread, so that a run that prints much never waits for space in the pipe.
        self.reader = threading.Thread(target=self._copy_output, args=(log,), daemon=True)
        self.reader.start()

    def _copy_output(self, log: Path) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines, log.open("a", encoding="utf-8", errors="replace") as file:
            for line in lines:
                file.write(line)
                file.flush()
                # A step begins by listing its settings, which are indented.
                if line.strip() and " |   " not in line:
                    self._last_line = line.strip()
                if evaluation := _EVALUATION.search(line):
                    self._eval_losses.put(float(evaluation["loss"]))

    def stop_if_hopeless(self) -> None:
        """Stop the run, once, where the job calls an evaluation loss hopeless; its step saves its work."""
        while not self._eval_losses.empty():
            loss = self._eval_losses.get()
            if self.job.is_hopeless and not self.is_stopped and self.job.is_hopeless(loss):
                self.is_stopped = True
                self.process.terminate()

    def print_progress(self, number: int, jobs: Sequence[Job]) -> None:
        """Print the last line of the run, if it is a new one and the previous is old enough."""
        line, now = self._last_line, time.monotonic()
        if line != self._printed_line and now - self._printed_at > _PRINT_SECONDS:
            self._printed_line, self._printed_at = line, now
            _say(number, jobs, line)


def outcome_of(job: Job) -> Outcome:
    """Return how a job ended that another program ran, such as Airflow."""
    return _outcome(job, _completed_code(job))


def _completed_code(job: Job) -> int | None:
    """Return the exit code of the job's last artifact, where it is in the store already."""
    return status.exit_code(job.plan, job.until)


def _missing_keys(job: Job) -> frozenset[str]:
    """Return the keys of the artifacts that the job has to make."""
    steps = (job.plan.step(step.name) for step in graph.steps_until(job.until))
    return frozenset(step.key for step in steps if status.find_manifest(job.plan, step.name) is None)


def _outcome(job: Job, code: int | None) -> Outcome:
    """Return how a job ended, with what the step says that ended it; without a code, by what it left in the store."""
    if code == Exit.DONE or (job.counts_refusal and _completed_code(job) is not None):
        return Outcome(int(Exit.DONE), "")
    store = open_store(job.plan.root)
    for step in graph.steps_until(job.until):
        manifest = status.find_manifest(job.plan, step.name)
        if manifest is not None and manifest.exit_code:
            return Outcome(manifest.exit_code, status.manifest_ending(manifest).sentence())
        ending = run_endings.read(store, job.plan.run_id, step.name) if manifest is None else None
        if ending is not None and ending.code:
            return Outcome(ending.code if code is None else code, ending.sentence())
    if code is None:
        return Outcome(int(Exit.TRY_AGAIN), "it did not run to its end, and has left no reason in the store")
    return Outcome(code, f"{describe(code)} ({code}); its log says more: logs/{_log_name(job)}")


def _log_name(job: Job) -> str:
    return f"{job.plan.run_id}-{job.until}.log"


def _say(number: int, jobs: Sequence[Job], text: str) -> None:
    # The standard output is for the result.
    line = f"{number + 1}/{len(jobs)} {jobs[number].label}: {text}"
    print(line if len(line) <= _LINE_CHARACTERS else f"{line[:_LINE_CHARACTERS]}...", file=sys.stderr, flush=True)


def _raise_keyboard_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
