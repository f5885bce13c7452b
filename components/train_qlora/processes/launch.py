"""Start the training processes, forward their output, and end them. The step itself is the process that does this.

Even a single training process is a child process, so that the step survives it and learns which signal ended it.
Several processes get the environment that torchrun would set, so torch and accelerate work as they do there. ADR 15
says why this is not torchrun. Only rank 0 prints.

Where one process fails, the others are killed and the root cause is raised here. An error with an exit code of its own
takes precedence, then a signal that ended a process. Any other error comes last, since most often the process has only
lost a peer.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from components.train_qlora.batching import process_micro_batch_size, with_noted_size
from components.train_qlora.processes import cgroup, worker
from components.train_qlora.report import TrainingResult
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress, signals
from qlora_retrain.core.errors import Cause, Problem, TryAgain

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# A request to stop is passed on after at most this long.
POLL_SECONDS = 0.2
# Once one process has failed, how long the others may still report their own error.
FAILURE_GRACE_SECONDS = 5.0


@dataclass
class WorkerHandle:
    """A training process, the pipe from it, and what it has reported.

    Attributes:
        rank: Its rank.
        process: The process.
        reader: This end of the pipe.
        outcome: Its last message: the result, or the exception that ended it; None until it arrives.
        outcome_time: When the outcome arrived, in seconds of the monotonic clock.
        exit_code: Its exit code, once it has ended by itself; None where the launcher killed it.
    """

    rank: int
    process: BaseProcess
    reader: Connection
    outcome: TrainingResult | Exception | None = None
    outcome_time: float = 0.0
    exit_code: int | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the process failed. A crash after it sent its result, as at a library's exit, does not count."""
        return isinstance(self.outcome, Exception) or (self.outcome is None and bool(self.exit_code))

    def receive(self) -> None:
        """Take every message that has arrived, and notice the process's end.

        The end is noticed even where something that the process started keeps the pipe open.
        """
        # Checked before the pipe is read, so that the last message of a process that has ended is not missed.
        has_ended = not self.process.is_alive()
        try:
            while self.reader.poll():
                self._handle(self.reader.recv())
        except (EOFError, OSError):
            has_ended = True

        if has_ended:
            self.reader.close()
            self.process.join()
            self.exit_code = self.process.exitcode

    def _handle(self, message: str | TrainingResult | Exception) -> None:
        if isinstance(message, str):
            progress.relay(message)
        else:
            self.outcome, self.outcome_time = message, time.monotonic()


def launch(
    config: TrainConfig,
    dataset: Path,
    base_nf4: Path,
    adapter: Path,
    scratch: Path,
    champion_adapter: Path | None = None,
) -> TrainingResult:
    """Run `train.train` in `config.num_processes` processes of their own; rank 0 writes the adapter.

    Raises:
        Problem: Whatever problem a process raises.
        MemoryError: If memory runs out in a process, also where the kernel killed it for that.
        TryAgain: If a process was killed for another reason, or the run was asked to stop.
        RuntimeError: For any other error in a process, with its traceback as a note.
    """
    store, port = _rendezvous_store() if config.num_processes > 1 else (None, None)
    job = worker.TrainingJob(config, dataset, base_nf4, adapter, scratch, port, os.getpid(), champion_adapter)
    if config.num_processes > 1:
        progress.say(
            f"{config.num_processes} processes share {config.global_batch_size} rows per step ({config.parallel})"
        )

    # A process that was killed while it saved may have left half a file.
    for leftover in adapter.iterdir():
        leftover.unlink()

    oom_kills_before = cgroup.oom_kills()
    workers: list[WorkerHandle] = []
    try:
        for rank in range(config.num_processes):
            workers.append(_start(rank, job))
        _supervise(workers)
    finally:
        for handle in workers:
            handle.process.kill()
            handle.process.join()
        del store

    for handle in workers:
        if handle.has_failed:
            # The kernel counts its kills but does not say which process it killed.
            by_oom_killer = oom_kills_before is not None and (cgroup.oom_kills() or 0) > oom_kills_before
            raise _root_cause(workers, with_noted_size(config, scratch), by_oom_killer=by_oom_killer)
    result = workers[0].outcome
    assert isinstance(result, TrainingResult)
    return result


def _rendezvous_store() -> tuple[TCPStore, int]:
    """Open the rendezvous store on loopback, at a port that no other program can take."""
    # Imported here: a single process needs no store, and torch takes memory.
    from torch.distributed import TCPStore

    # Port 0 lets the kernel choose, and the open socket keeps any other program from taking the port.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()), port


def _start(rank: int, job: worker.TrainingJob) -> WorkerHandle:
    # A fork would copy threads' locks, and CUDA does not survive one.
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=worker.main, args=(rank, job, writer), name=f"rank-{rank}", daemon=True)
    process.start()
    # The worker now has the only open writer, so the pipe ends when the worker does.
    writer.close()
    return WorkerHandle(rank, process, reader)


def _supervise(workers: list[WorkerHandle]) -> None:
    """Receive messages until all processes have ended, and pass on a request to stop.

    Where one of several has failed, return after the others have had time to report.
    """
    stop_sent, deadline = False, float("inf")
    while (running := [w for w in workers if not w.reader.closed]) and time.monotonic() < deadline:
        if signals.stop_requested() and not stop_sent:
            stop_sent = True
            for handle in running:
                if handle.process.is_alive():
                    os.kill(handle.process.pid or 0, signal.SIGTERM)

        wait([source for w in running for source in (w.reader, w.process.sentinel)], timeout=POLL_SECONDS)
        for handle in running:
            handle.receive()

        # A peer of the failed process may know the cause, or hang in a collective for ever.
        if len(workers) > 1 and any(handle.has_failed for handle in workers):
            deadline = min(deadline, time.monotonic() + FAILURE_GRACE_SECONDS)


def _root_cause(workers: list[WorkerHandle], config: TrainConfig, *, by_oom_killer: bool) -> Exception:
    """Return the error that the other processes' errors followed from.

    Args:
        workers: All of them, at least one of which has failed.
        config: The settings, for the message.
        by_oom_killer: Whether the kernel killed a process for memory meanwhile.
    """
    # In the order of arrival, since the first error is the likeliest cause.
    errors = [w.outcome for w in sorted(workers, key=lambda w: w.outcome_time) if isinstance(w.outcome, Exception)]
    for error in errors:
        if isinstance(error, Problem | MemoryError):
            return error

    for handle in workers:
        if handle.exit_code and handle.exit_code < 0:
            return _signal_error(handle, config, signal.Signals(-handle.exit_code), by_oom_killer=by_oom_killer)

    if errors:
        return errors[0]
    failed_worker = next(handle for handle in workers if handle.has_failed)
    return RuntimeError(
        f"process {failed_worker.rank} ended with exit code {failed_worker.exit_code} and reported no error"
    )


def _signal_error(
    handle: WorkerHandle, config: TrainConfig, ending_signal: signal.Signals, *, by_oom_killer: bool
) -> Exception:
    """Return the error for a process that a signal ended."""
    is_one_of_several = config.num_processes > 1
    process_name = f"process {handle.rank} of {config.num_processes}" if is_one_of_several else "the training process"
    if ending_signal == signal.SIGKILL and by_oom_killer:
        limit = cgroup.limit_mib()
        return MemoryError(
            f"out of memory with a micro-batch size of {process_micro_batch_size(config)}: the kernel killed "
            f"{process_name}" + (f" at the memory limit of {limit} MiB" if limit else "")
        )
    return TryAgain(
        f"{process_name} was ended by {ending_signal.name}"
        + (", as happens when memory runs out" if ending_signal == signal.SIGKILL else "")
        + ("; the others were stopped" if is_one_of_several else "")
        + ". Run the same command again: it resumes from the newest checkpoint",
        cause=Cause.PREEMPTED,
    )
