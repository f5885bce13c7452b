"""Run one training process, alone or as one of several. `launch` starts it and reads its pipe; it dies with its parent.

The parent imports this module too and must stay small, so modules that take memory are imported inside functions.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import signals, supervisor
from qlora_retrain.core.bounds import Watchdog
from qlora_retrain.core.errors import Problem, UsageError

if TYPE_CHECKING:
    from components.train_qlora.report import TrainingResult

# How long a collective waits for a slow peer. The parent process notices a dead one.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
# On a CPU, oneDNN compiles a kernel of about 0.3 MB for every shape of a product of bf16 matrices. It keeps 1,024 of
# them, and torch another 1,024 beside it. Rows of changing lengths give new shapes in every step: without a bound,
# memory grows by 10 to 30 MB a step, and small kernels between large tensors keep freed memory from being used again.
# A step needs 60 to 100 kernels, however many layers there are; with fewer than that it compiles them again and again.
KERNEL_CACHE_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
KERNEL_CACHE_ENTRIES = 192


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """The arguments of a training process, and where the processes meet.

    Attributes:
        config: The settings of the step.
        dataset: The folder with `train.jsonl` and `eval.jsonl`.
        base_nf4: The quantized base model.
        adapter: The folder to write.
        scratch: The folder of the checkpoints.
        port: The port of the rendezvous store on loopback, which the parent holds; None for a single process.
        parent_pid: The process id of the parent, which starts them.
        champion_adapter: The folder with the adapter from which training goes on; None: it begins with a new one.
    """

    config: TrainConfig
    dataset: Path
    base_nf4: Path
    adapter: Path
    scratch: Path
    port: int | None
    parent_pid: int
    champion_adapter: Path | None = None


class PipeStream(io.TextIOBase):
    """A text stream whose lines go through a pipe to the process that started this one; any thread may write.

    Attributes:
        writer: This end of the pipe.
        forwards_lines: Whether lines are sent; otherwise they are dropped, since only rank 0 prints.
    """

    def __init__(self, writer: Connection, *, forwards_lines: bool) -> None:
        self.writer, self.forwards_lines, self.partial_line = writer, forwards_lines, ""
        # Reentrant, since a signal handler may write while this thread does.
        self.lock = threading.RLock()

    def write(self, text: str) -> int:
        """Send each line that is now complete."""
        with self.lock:
            *lines, self.partial_line = (self.partial_line + text).split("\n")
            if self.forwards_lines:
                for line in lines:
                    self.writer.send(line)
        return len(text)

    def send_outcome(self, outcome: TrainingResult | Exception) -> None:
        """Send the last message: the result, or the exception that ended the work."""
        with self.lock:
            self.writer.send(outcome)


def main(rank: int, job: TrainingJob, writer: Connection) -> None:
    """Train, sending lines of text and, last, the result or the exception that ended it."""
    # Read when the first product is computed; an environment that sets them knows better.
    for name in KERNEL_CACHE_VARIABLES:
        os.environ.setdefault(name, str(KERNEL_CACHE_ENTRIES))

    # A new process group: a signal to the parent's group reaches only the parent, which passes it on.
    os.setpgid(0, 0)
    supervisor.exit_with_parent(job.parent_pid, signal.SIGKILL)
    signals.install(graceful=True, ignore_repeat=True)

    # A process that a library starts must not inherit the pipe, or the pipe would stay open.
    os.set_inheritable(writer.fileno(), False)
    sys.stdout = sys.stderr = stream = PipeStream(writer, forwards_lines=rank == 0)
    Watchdog.end_process = partial(_end_process, stream)
    try:
        _begin(rank, job)
        from components.train_qlora import train

        result = train.train(job.config, job.dataset, job.base_nf4, job.adapter, job.scratch, job.champion_adapter)
        _end(job)
        stream.send_outcome(result)
    except Exception as error:  # noqa: BLE001 - it is raised again where the step runs
        stream.send_outcome(_picklable_error(rank, job, error))
        if job.port is not None:
            # Exit without cleanup: a library that waits for the other processes at exit would wait for ever.
            os._exit(1)
        sys.exit(1)


def _end_process(stream: PipeStream, reason: str) -> NoReturn:
    """Report work in native code that takes too long, and end the process."""
    stream.send_outcome(UsageError(reason))
    os._exit(1)


def _begin(rank: int, job: TrainingJob) -> None:
    """Check the machine, and meet the other processes."""
    from components.train_qlora import preflight

    preflight.check_environment(job.config)
    if job.port is not None:
        _init_process_group(rank, job, job.port)


def _end(job: TrainingJob) -> None:
    """Part from the other processes; one that leaves early would break a collective that a peer is still in."""
    if job.port is not None:
        import torch.distributed as dist

        from components.train_qlora.processes import distributed

        distributed.barrier()
        dist.destroy_process_group()


def _init_process_group(rank: int, job: TrainingJob, port: int) -> None:
    """Join the process group on loopback: gloo for flags and counts, NCCL for gradients where there are GPUs."""
    import torch
    import torch.distributed as dist

    world_size, uses_gpu = job.config.num_processes, job.config.device == "cuda"
    # The variables that torchrun would set and accelerate reads.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo",
    )  # fmt: skip

    if uses_gpu:
        torch.cuda.set_device(rank)
    else:
        # The processes share the cores, but each would by default start one thread per core.
        torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    dist.init_process_group("cpu:gloo,cuda:nccl" if uses_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT)


def _picklable_error(rank: int, job: TrainingJob, error: Exception) -> Exception:
    """Return an exception that can be pickled: a problem as it is, any other as text with its traceback as a note."""
    if isinstance(error, MemoryError):
        # numpy's subclass takes other arguments, so it could not be unpickled.
        return MemoryError(str(error))
    if isinstance(error, Problem):
        return type(error)(str(error), cause=error.cause)

    process_name = f"process {rank}: " if job.config.num_processes > 1 else ""
    wrapped_error = RuntimeError(f"{process_name}{type(error).__name__}: {error}")
    wrapped_error.add_note(traceback.format_exc())
    return wrapped_error
