"""Turn the exception that ends a step into an `Ending`, in one place.

Our own errors have their exit code and cause. Of the errors of libraries, three kinds are recognised: memory that ran
out, a full disk, and a stop signal that a library wrapped. A file that vanished from the store is none of our bugs
either. Any other exception is one.
"""

from __future__ import annotations

from qlora_retrain.core import signals
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause, Exit, Problem, TryAgain
from qlora_retrain.lm import oom
from qlora_retrain.storage.store import NotFound


def classify(step_name: str, error: Exception, *, key: str | None = None) -> Ending:
    """Return the ending that an error of a step causes."""

    def ending(code: Exit, cause: Cause, reason: str) -> Ending:
        return Ending(int(code), cause, reason, step_name, key)

    # The signal's exception may be raised inside a library, which then wraps it in an error of its own.
    if signals.stop_requested() and not isinstance(error, TryAgain):
        return ending(Exit.TRY_AGAIN, Cause.PREEMPTED, f"stopped; run the same command again to continue ({error})")
    # Our own errors have their exit code and their cause.
    if isinstance(error, Problem):
        return Ending.from_problem(step_name, error, key=key)
    # A retry may find room: other runs end, and the node cache can be emptied.
    if oom.is_disk_full(error):
        reason = f"the disk is full: {error}; half-written files were removed; make room, then run again"
        return ending(Exit.TRY_AGAIN, Cause.DISK_FULL, reason)
    # Before the host's memory: the GPU's errors are a kind of out-of-memory error too.
    if oom.is_gpu_out_of_memory(error):
        advice = "set a smaller train.micro_batch_size, use shorter rows or a GPU with more memory"
        return ending(Exit.OUT_OF_MEMORY, Cause.GPU_OOM, f"the GPU ran out of memory; {advice}: {error}")
    if oom.is_out_of_memory(error):
        return ending(Exit.OUT_OF_MEMORY, Cause.HOST_OOM, f"the machine ran out of memory: {error}")
    if isinstance(error, NotFound):
        reason = f"{error}: is no longer there, or somebody put a link in its place; have it made again"
        return ending(Exit.INTEGRITY, Cause.INTEGRITY, reason)
    return ending(Exit.BUG, Cause.BUG, f"{type(error).__name__}: {error}")
