"""The processes that train: started, listened to and ended by the one that runs the step.

A single one is a process of its own too, so that the step is there to see what the kernel did to it. Several get the
environment that torchrun would give them, so torch and accelerate work as they would there; ADR 15 says why the
launcher is not torchrun's. The first one talks for all. Where one fails the others are killed, and what it failed of is
raised here: an ending with a code of its own before a signal that ended one, and that before any other error, which is
most often only the loss of a neighbour.
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

from components.train_qlora import cgroup, worker
from components.train_qlora.result import Trained
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress, signals
from qlora_retrain.core.errors import Problem, TryAgain

if TYPE_CHECKING:
    from torch.distributed import TCPStore

TICK_SECONDS = 0.2  # how soon a request to stop is passed on
GRACE_SECONDS = 5.0  # what the others get to say once one has failed


@dataclass
class Member:
    """A process and what it has said."""

    rank: int
    process: BaseProcess
    ear: Connection
    said: Trained | Exception | None = None
    said_at: float = 0.0
    exit_code: int | None = None  # only where it ended before anybody ended it

    @property
    def failed(self) -> bool:
        """Whether it cannot go on. What crashes once the result is told, as libraries may while they end, has not."""
        return isinstance(self.said, Exception) or (self.said is None and bool(self.exit_code))

    def listen(self) -> None:
        """Take what it has said by now; note its end, even where something that it started keeps the pipe open."""
        ended = not self.process.is_alive()  # looked at first: what it said last is then there to be taken
        try:
            while self.ear.poll():
                self._take(self.ear.recv())
        except (EOFError, OSError):
            ended = True
        if ended:
            self.ear.close()
            self.process.join()
            self.exit_code = self.process.exitcode

    def _take(self, heard: str | Trained | Exception) -> None:
        if isinstance(heard, str):
            progress.repeat(heard)
        else:
            self.said, self.said_at = heard, time.monotonic()


def train_apart(config: TrainConfig, dataset: Path, base_nf4: Path, adapter: Path, scratch: Path) -> Trained:
    """`training.train` in `config.processes` processes of their own; the first one writes.

    Raises:
        Problem: What the processes raise.
        MemoryError: If memory runs out in one of them, also where the kernel killed it for that.
        TryAgain: If one was killed otherwise, or all were asked to stop.
        RuntimeError: For any other fault of theirs, with its traceback as a note.
    """
    store, port = _store() if config.processes > 1 else (None, None)
    job = worker.Job(config, dataset, base_nf4, adapter, scratch, port, os.getpid())
    if config.processes > 1:
        progress.say(f"{config.processes} processes share {config.rows_a_step} rows a step ({config.parallel})")
    for left in adapter.iterdir():  # by a process that was killed while it saved
        left.unlink()
    kills = cgroup.kills()
    members: list[Member] = []
    try:
        for rank in range(config.processes):
            members.append(_started(rank, job))
        _follow(members)
    finally:
        for member in members:
            member.process.kill()
            member.process.join()
        del store
    for member in members:
        if member.failed:
            raise _cause(members, config, for_memory=kills is not None and (cgroup.kills() or 0) > kills)
    found = members[0].said
    assert isinstance(found, Trained)
    return found


def _store() -> tuple[TCPStore, int]:
    """Where the processes meet: on loopback alone, at a port that is ours from the moment it is chosen."""
    from torch.distributed import TCPStore  # here: a single process meets nobody, and torch takes memory

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    return TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listening.detach()), port


def _started(rank: int, job: worker.Job) -> Member:
    context = multiprocessing.get_context("spawn")
    ear, mouth = context.Pipe(duplex=False)
    process = context.Process(target=worker.main, args=(rank, job, mouth), name=f"rank-{rank}", daemon=True)
    process.start()
    mouth.close()
    return Member(rank, process, ear)


def _follow(members: list[Member]) -> None:
    """Listen until all have ended, or one of several has failed and the others have had their say; pass on a stop."""
    asked, over = False, float("inf")
    while (open_ones := [m for m in members if not m.ear.closed]) and time.monotonic() < over:
        if signals.requested() and not asked:
            asked = True
            for member in open_ones:
                if member.process.is_alive():
                    os.kill(member.process.pid or 0, signal.SIGTERM)
        wait([w for m in open_ones for w in (m.ear, m.process.sentinel)], timeout=TICK_SECONDS)
        for member in open_ones:
            member.listen()
        if len(members) > 1 and any(member.failed for member in members):
            over = min(over, time.monotonic() + GRACE_SECONDS)


def _cause(members: list[Member], config: TrainConfig, *, for_memory: bool) -> Exception:
    """What ended the run: the error that the others followed from. The kernel ended one `for_memory`, or did not."""
    errors = [m.said for m in sorted(members, key=lambda m: m.said_at) if isinstance(m.said, Exception)]
    for error in errors:
        if isinstance(error, Problem | MemoryError):
            return error
    for member in members:
        if member.exit_code and member.exit_code < 0:
            return _ended(member, config, signal.Signals(-member.exit_code), for_memory=for_memory)
    if errors:
        return errors[0]
    silent = next(member for member in members if member.failed)
    return RuntimeError(f"process {silent.rank} ended with exit code {silent.exit_code} and said nothing")


def _ended(member: Member, config: TrainConfig, by: signal.Signals, *, for_memory: bool) -> Exception:
    several = config.processes > 1
    who = f"process {member.rank} of {config.processes}" if several else "the process that trains"
    if by == signal.SIGKILL and for_memory:
        limit = cgroup.limit_mib()
        return MemoryError(
            f"out of memory with {config.rows_a_pass} rows a pass: the kernel killed {who} for it"
            + (f", the limit being {limit} MiB" if limit else "")
        )
    return TryAgain(
        f"{who} was ended by {by.name}"
        + (", as when memory runs out" if by == signal.SIGKILL else "")
        + ("; the others were stopped" if several else "")
        + ". Run the same command again: it goes on from the newest checkpoint"
    )
