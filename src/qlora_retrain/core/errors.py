"""Every error and every exit code of this project, in one table that all runtimes share.

    Problem                      the base class: an error with an exit code, and a text for a person
    ├── DataRefused        10    the data gate says no
    ├── QualityRefused     11    the verdict says no, or there is not enough evidence
    ├── UsageError         12    a config, an argument or an input that cannot be used
    ├── IntegrityError     13    bytes that differ from their recorded hash, or are not safe to load
    ├── Diverged           14    training went wrong
    └── TryAgain           75    preempted, throttled, disk full, input collected, champion moved

Any other exception is a bug of ours: exit code 1 and a traceback.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Exit(enum.IntEnum):
    """Exit codes of a step, and of `qlora-retrain`."""

    DONE = 0
    BUG = 1
    DATA_REFUSED = 10
    QUALITY_REFUSED = 11
    USAGE = 12
    INTEGRITY = 13
    DIVERGED = 14
    TRY_AGAIN = 75
    OUT_OF_MEMORY = 137


class Cause(enum.StrEnum):
    """Why a step did not succeed; runtimes decide by it, and dashboards count by it."""

    DATA_REFUSED = "data_refused"
    QUALITY_REFUSED = "quality_refused"
    INPUT_REFUSED = "input_refused"  # an earlier step refused, so this one did not run
    USAGE = "usage"
    INTEGRITY = "integrity"
    DIVERGED = "diverged"
    BUG = "bug"
    GPU_OOM = "gpu_oom"
    HOST_OOM = "host_oom"
    DISK_FULL = "disk_full"
    PREEMPTED = "preempted"  # asked to stop: a signal, an eviction, a node that is drained
    THROTTLED = "throttled"  # a store or an API is busy or cannot be reached
    INPUT_MISSING = "input_missing"
    TIME_BUDGET = "time_budget"  # train.max_hours, or the time that a task may take, is used up
    CONFLICT = "conflict"  # another writer moved the alias
    NODE_LOST = "node_lost"
    NOT_STARTED = "not_started"  # no node, no image, no secret: the step's program never ran
    KILLED = "killed"  # by a signal of unknown origin
    TEMPORARY = "temporary"  # any other failure that a retry may cure


# The words of messages; a message begins with them and the code, e.g. `try again (75): ...`.
MEANING = {
    Exit.DONE: "done",
    Exit.BUG: "internal error",
    Exit.DATA_REFUSED: "data refused",
    Exit.QUALITY_REFUSED: "quality refused or insufficient evidence",
    Exit.USAGE: "config or usage error",
    Exit.INTEGRITY: "integrity or security",
    Exit.DIVERGED: "training diverged",
    Exit.TRY_AGAIN: "try again",
    Exit.OUT_OF_MEMORY: "out of memory",
}


MAX_MESSAGE_CHARACTERS = 20_000


class Problem(Exception):
    """An error that a person can act on: it says what was expected, what was found, where, and what to do."""

    exit_code: ClassVar[Exit] = Exit.BUG
    default_cause: ClassVar[Cause] = Cause.BUG

    def __init__(self, message: str = "", *, cause: Cause | None = None) -> None:
        # It quotes files of strangers, which may have names and texts of any length.
        num_hidden = len(message) - MAX_MESSAGE_CHARACTERS
        super().__init__(f"{message[:MAX_MESSAGE_CHARACTERS]}… ({num_hidden:,} more)" if num_hidden > 0 else message)
        self.cause = cause or self.default_cause


class DataRefused(Problem):
    """The data gate says no; the artifact with its report stays in the store."""

    exit_code = Exit.DATA_REFUSED
    default_cause = Cause.DATA_REFUSED


class QualityRefused(Problem):
    """The verdict says no, or there is too little evidence; the artifact with its report stays in the store."""

    exit_code = Exit.QUALITY_REFUSED
    default_cause = Cause.QUALITY_REFUSED


class UsageError(Problem):
    """A config, an argument or an input that cannot be used as it is."""

    exit_code = Exit.USAGE
    default_cause = Cause.USAGE


class IntegrityError(Problem):
    """Bytes that differ from their recorded hash, or that are not safe to load."""

    exit_code = Exit.INTEGRITY
    default_cause = Cause.INTEGRITY


class Diverged(Problem):
    """Training produced a non-finite or hopeless loss."""

    exit_code = Exit.DIVERGED
    default_cause = Cause.DIVERGED


class TryAgain(Problem):
    """The same command may succeed later: preempted, throttled, disk full, champion moved."""

    exit_code = Exit.TRY_AGAIN
    default_cause = Cause.TEMPORARY


def describe(code: int) -> str:
    """Return the meaning of an exit code, for a log line; negative codes and 128+n are signals."""
    if code in MEANING:
        return MEANING[Exit(code)]
    # Python's subprocess reports signal n as -n, a shell or a container as 128+n.
    number = -code if code < 0 else code - 128
    return f"ended by signal {number}" if 0 < number < 65 else f"unknown exit code {code}"


def may_retry(code: int) -> bool:
    """Return whether a runtime may run the step again: after 75, 137 or any signal; any other would fail again.

    A `code` below zero is a signal as Python's `subprocess` reports it, 128+n as a shell or a container does.
    """
    return code == Exit.TRY_AGAIN or code < 0 or 128 < code < 193


def is_refusal(code: int) -> bool:
    """Return whether this exit code is a refusal: the artifact is complete, and its verdict is no."""
    return code in (Exit.DATA_REFUSED, Exit.QUALITY_REFUSED)
