"""The step as its runner would start and end it, run as a file: `python program.py '{"config": …, "dataset": …, …}'`.

The processes that train read this file too, so the environment can put a fault into one. `FAULT=what:n` is of the n-th
forward pass and after it, in process 1 where there are several; `FAULT=limit:n` allows n MiB beyond what torch takes;
`FAULT=late:0` crashes once the work is done.
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


def put_the_fault_in() -> None:
    """Have the loss of a pass go wrong."""
    from components.train_qlora import trainer

    plain, passes = trainer.summed_loss, count()

    def spoilt(model: Any, batch: Any) -> Any:
        loss = plain(model, batch)
        number = next(passes) - int(AT)
        if os.environ.get("RANK", "1") != "1" or number < 0:
            return loss
        if FAULT == "nan":
            return loss * float("nan")
        if FAULT == "memory" and len(batch["input_ids"]) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if FAULT == "bug":
            raise ValueError("a fault of ours")
        if FAULT.startswith("SIG") and number == 0:
            os.kill(os.getpid(), getattr(signal, FAULT))
        if FAULT == "orphan":
            leave_an_orphan()
        return loss

    trainer.summed_loss = spoilt


def leave_an_orphan() -> None:
    """Be killed, and leave a process behind that has all pipes of this one but what it would say."""
    if os.fork() == 0:
        os.closerange(0, 3)
        time.sleep(8)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def limit_memory() -> None:
    """Refuse memory beyond what this process has, once it has torch."""
    import components.train_qlora.training  # noqa: F401

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + int(AT) * 2**20, resource.RLIM_INFINITY))


def main() -> None:
    """Run the step, print its numbers, end with its code."""
    from components.train_qlora.step import run
    from qlora_retrain.config.sections import TrainConfig
    from qlora_retrain.core import signals
    from qlora_retrain.core.errors import Problem

    given = json.loads(sys.argv[1])
    signals.install(polite=True)
    print("ready", flush=True)
    paths = [Path(given[name]) for name in ("dataset", "base_nf4", "adapter")]
    try:
        print(json.dumps(run(TrainConfig(**given["config"]), *paths, scratch=Path(given["scratch"])).numbers))
    except (Problem, MemoryError) as error:
        print(error, file=sys.stderr)
        sys.exit(137 if isinstance(error, MemoryError) else error.exit_code)


if __name__ == "__main__":
    main()
elif FAULT == "limit":
    limit_memory()
elif FAULT == "late":
    atexit.register(os.abort)
elif FAULT:
    put_the_fault_in()
