"""Run the step as its runner would start and end it: `python program.py '{"config": …, "dataset": …, …}'`.

The training processes read this file too, so the environment can inject a fault into one of them. `FAULT=kind:n`
injects it from the n-th forward pass on, in rank 1 where there are several. `FAULT=measure:n` refuses memory to a
measured step of more than n rows there. `FAULT=limit:n` allows n MiB of memory beyond what torch takes. `FAULT=late:0`
crashes once the work is done.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

FAULT, AT = os.environ.get("FAULT", ":").split(":")


def inject_fault() -> None:
    """Replace the loss of a micro-batch by one that goes wrong."""
    from components.train_qlora import auto_size, train

    correct_loss, calls = train.summed_loss, count()

    def faulty_loss(model: Any, batch: Any) -> Any:
        loss = correct_loss(model, batch)
        calls_since_fault = next(calls) - int(AT)
        # A single process has no RANK.
        if os.environ.get("RANK", "1") != "1" or calls_since_fault < 0:
            return loss

        if FAULT == "nan":
            return loss * float("nan")
        if FAULT == "memory" and batch.num_rows > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if FAULT == "bug":
            raise ValueError("a fault of ours")
        if FAULT.startswith("SIG") and calls_since_fault == 0:
            os.kill(os.getpid(), getattr(signal, FAULT))
        if FAULT == "stop" and calls_since_fault == 0:
            stop_the_step()
        if FAULT == "orphan":
            leave_an_orphan()
        return loss

    def measured_loss(model: Any, batch: Any) -> Any:
        if os.environ.get("RANK", "1") == "1" and batch.num_rows > int(AT):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return correct_loss(model, batch)

    if FAULT == "measure":
        auto_size.summed_loss = measured_loss
    else:
        train.summed_loss = faulty_loss


def stop_the_step() -> None:
    """Ask the step to stop, as the end of a pod does, and wait until it has passed that on to this process."""
    from qlora_retrain.core import signals

    os.kill(os.getppid(), signal.SIGTERM)
    while not signals.stop_requested():
        time.sleep(0.01)


def leave_an_orphan() -> None:
    """Be killed, and leave behind a child that holds every pipe of this process except stdin, stdout and stderr."""
    # The child outlives the step; the test ends it.
    if os.fork() == 0:
        os.closerange(0, 3)
        time.sleep(400)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def limit_memory() -> None:
    """Refuse memory beyond what this process has once torch is imported."""
    import components.train_qlora.train  # noqa: F401

    # The limit is on address space, which grows with every large tensor.
    size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + int(AT) * 2**20, resource.RLIM_INFINITY))


def inject_fault_into_forked_processes() -> None:
    """Do for training processes that are forked what importing this file does for those that are spawned."""
    from components.train_qlora.processes import worker

    plain = worker.main

    def main_with_fault(*arguments: Any) -> None:
        inject_fault()
        plain(*arguments)

    worker.main = main_with_fault


def main() -> None:
    """Run the step, print its numbers, and exit with its code."""
    from components.train_qlora.step import run
    from qlora_retrain.config.sections import TrainConfig
    from qlora_retrain.core import signals
    from qlora_retrain.core.errors import Problem

    arguments = json.loads(sys.argv[1])
    signals.install(graceful=True)
    print("ready", flush=True)
    paths = [Path(arguments[name]) for name in ("dataset", "base_nf4", "adapter")]
    try:
        print(json.dumps(run(TrainConfig(**arguments["config"]), *paths, scratch=Path(arguments["scratch"])).numbers))
    except (Problem, MemoryError) as error:
        print(error, file=sys.stderr)
        sys.exit(137 if isinstance(error, MemoryError) else error.exit_code)


# Imported by a training process, which spawn starts anew: the fault goes into that one, not into the step.
if __name__ == "__main__":
    if FAULT and os.environ.get("FORKED"):
        inject_fault_into_forked_processes()
    main()
elif FAULT == "limit":
    limit_memory()
elif FAULT == "late":
    atexit.register(os.abort)
elif FAULT:
    inject_fault()
