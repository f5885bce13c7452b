"""Every way this project ends, in one table, shared by all runtimes.

    Problem                      an ending with an exit code; its text is for a person
    ├── DataRefused        10    the data gate says no
    ├── QualityRefused     11    the verdict says no, or there is not enough evidence
    ├── UsageError         12    a config, an argument or an input that cannot be used
    ├── IntegrityError     13    bytes that are not what was promised, or are not safe to load
    ├── Diverged           14    training went wrong
    └── TryAgain           75    preempted, throttled, disk full, input collected, champion moved

Anything else is our bug: exit code 1 and a traceback.
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


MEANING = {
    Exit.DONE: "done",
    Exit.BUG: "our bug",
    Exit.DATA_REFUSED: "data refused",
    Exit.QUALITY_REFUSED: "quality refused or insufficient evidence",
    Exit.USAGE: "config or usage",
    Exit.INTEGRITY: "integrity or security",
    Exit.DIVERGED: "training diverged",
    Exit.TRY_AGAIN: "try again",
    Exit.OUT_OF_MEMORY: "killed for memory",
}


OF_THE_GPU = "the GPU's memory does not do"  # said with 137: more of the host's memory would not help


class Problem(Exception):
    """An ending that a person can act on: what was wanted, what was found, where, what to do."""

    exit_code: ClassVar[Exit] = Exit.BUG


class DataRefused(Problem):
    """The data gate says no; the artifact with its report is kept."""

    exit_code = Exit.DATA_REFUSED


class QualityRefused(Problem):
    """The verdict says no, or the evidence is too thin; the artifact with its report is kept."""

    exit_code = Exit.QUALITY_REFUSED


class UsageError(Problem):
    """A config, an argument or an input that cannot be used as it is."""

    exit_code = Exit.USAGE


class IntegrityError(Problem):
    """Bytes that are not what was promised, or that are not safe to load."""

    exit_code = Exit.INTEGRITY


class Diverged(Problem):
    """Training produced a non-finite or hopeless loss."""

    exit_code = Exit.DIVERGED


class TryAgain(Problem):
    """The same command may succeed later: preempted, throttled, disk full, champion moved."""

    exit_code = Exit.TRY_AGAIN


def describe(code: int) -> str:
    """What an exit code means, for a log line; negative codes and 128+n are signals."""
    if code in MEANING:
        return MEANING[Exit(code)]
    number = -code if code < 0 else code - 128
    return f"ended by signal {number}" if 0 < number < 65 else f"unknown exit code {code}"


def may_retry(code: int) -> bool:
    """Whether a runtime may run the step again: 75, 137 and any signal; all else would fail again.

    A `code` below zero is a signal as Python's `subprocess` reports it, 128+n as a shell or a container does.
    """
    return code == Exit.TRY_AGAIN or code < 0 or 128 < code < 193


def refusal(code: int) -> bool:
    """Whether this exit code is an outcome (a completed artifact that says no) and not an error."""
    return code in (Exit.DATA_REFUSED, Exit.QUALITY_REFUSED)
