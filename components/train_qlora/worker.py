"""A process that trains, alone or together with others: started by `processes`, heard over a pipe, gone when it is.

Whoever starts it reads this module too, and is to stay small: what takes memory is imported where it is used.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import signals, supervisor
from qlora_retrain.core.errors import Problem

if TYPE_CHECKING:
    from components.train_qlora.result import Trained

PATIENCE = timedelta(hours=2)  # of one process for another; a dead one is noticed by whoever started them


@dataclass(frozen=True, slots=True)
class Job:
    """What the processes are to do, and where they meet.

    Attributes:
        port: Of the store on loopback, which whoever started them holds; None where there is one process.
        parent: Whoever started them.
    """

    config: TrainConfig
    dataset: Path
    base_nf4: Path
    adapter: Path
    scratch: Path
    port: int | None
    parent: int


class Voice(io.TextIOBase):
    """A stream whose lines go to whoever started this process, if this one `talks`; any thread may write."""

    def __init__(self, mouth: Connection, *, talks: bool) -> None:
        self.mouth, self.talks, self.rest = mouth, talks, ""
        self.one_at_a_time = threading.RLock()  # reentrant: a signal's handler writes too

    def write(self, text: str) -> int:
        """Send what has become a whole line."""
        with self.one_at_a_time:
            *lines, self.rest = (self.rest + text).split("\n")
            if self.talks:
                for line in lines:
                    self.mouth.send(line)
        return len(text)

    def end(self, found: Trained | Exception) -> None:
        """Send what became of the work."""
        with self.one_at_a_time:
            self.mouth.send(found)


def main(rank: int, job: Job, mouth: Connection) -> None:
    """Train; send lines of text, and last what was learned or the exception that ended it."""
    os.setpgid(0, 0)  # a signal to the whole group is for whoever started us, who passes it on
    supervisor.die_with(job.parent, signal.SIGKILL)
    signals.install(polite=True, patient=True)
    os.set_inheritable(mouth.fileno(), False)  # what a library starts is not to keep the pipe open
    sys.stdout = sys.stderr = voice = Voice(mouth, talks=rank == 0)
    stay_light()
    try:
        voice.end(_trained(rank, job))
    except Exception as error:  # noqa: BLE001 - it is raised again where the step runs
        voice.end(_told(rank, job, error))
        if job.port is not None:
            os._exit(1)  # at once: a library that waits for the other processes would wait for ever
        sys.exit(1)


def stay_light() -> None:
    """Have transformers find no `datasets`: pandas and pyarrow come with it, 80 MiB for which training has no use.

    To be called before anything imports the Trainer, in a process that does nothing else.
    """
    sys.modules["datasets"] = None  # type: ignore[assignment] # the import system's own word for: not to be had


def _trained(rank: int, job: Job) -> Trained:
    from torch import distributed

    from components.train_qlora import ranks, training

    training.refuse_what_is_not_here(job.config)
    if job.port is not None:
        _meet(rank, job, job.port)
    found = training.train(job.config, job.dataset, job.base_nf4, job.adapter, job.scratch)
    if job.port is not None:
        ranks.together()
        distributed.destroy_process_group()
    return found


def _meet(rank: int, job: Job, port: int) -> None:
    """Join the others: flags and counts by gloo, gradients by NCCL where there are GPUs; all of it on loopback."""
    import torch
    from torch import distributed

    n, cuda = job.config.processes, job.config.device == "cuda"
    os.environ.update(  # what torchrun would set, and accelerate reads
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo",
    )  # fmt: skip
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // n))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)


def _told(rank: int, job: Job, error: Exception) -> Exception:
    """What can be sent: a problem as it is, anything else in words, with its traceback as a note."""
    if isinstance(error, MemoryError):  # numpy's takes other arguments
        return MemoryError(str(error))
    if isinstance(error, Problem):
        return type(error)(str(error))
    who = f"process {rank}: " if job.config.processes > 1 else ""
    told = RuntimeError(f"{who}{type(error).__name__}: {error}")
    told.add_note(traceback.format_exc())
    return told
