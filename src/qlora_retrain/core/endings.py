"""How a step ended, as data: one JSON document that runtimes, pages and other tools read instead of sentences.

A step writes it last, to four places: one marked line on stdout, the pod's termination log, KFP's output parameter
`ending`, and `runs/<run_id>/endings/<step>.json` in the store. A process that was killed writes none. Then the runtime
builds one from the exit code and from what the container engine or the cluster reports.

    kind      code           meaning
    done      0              the artifact is complete
    refused   10, 11         the artifact is complete and says no
    error     1, 12-14, 137  the same command would fail again
    retry     75, 137, n<0   the same command may succeed
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qlora_retrain.core import uris
from qlora_retrain.core.errors import Cause, Exit, Problem, describe, is_refusal, may_retry
from qlora_retrain.core.visible_text import escape_controls

# The beginning of the marked line; no other line of a step's output may begin like this.
MARK = "qlora-retrain-ending: "


class Kind(enum.StrEnum):
    """What an ending means for the runtime that runs the step."""

    DONE = "done"
    REFUSED = "refused"
    ERROR = "error"
    RETRY = "retry"


# The cause where only the exit code is known, as of a process that was killed.
_CAUSES = {
    Exit.BUG: Cause.BUG,
    Exit.DATA_REFUSED: Cause.DATA_REFUSED,
    Exit.QUALITY_REFUSED: Cause.QUALITY_REFUSED,
    Exit.USAGE: Cause.USAGE,
    Exit.INTEGRITY: Cause.INTEGRITY,
    Exit.DIVERGED: Cause.DIVERGED,
    Exit.TRY_AGAIN: Cause.TEMPORARY,
    Exit.OUT_OF_MEMORY: Cause.HOST_OOM,
}
# More of the host's memory would not help, so the same command would fail again.
_NEVER_RETRIED = (Cause.GPU_OOM,)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a step ended.

    Attributes:
        code: The exit code; a negative one is the signal that ended the process, e.g. -9 for SIGKILL.
        cause: Why it did not succeed; None where it did.
        reason: What happened and what to do, in words for a person. No program reads it.
        step: The step's name.
        key: The key of the artifact that the step makes.
        attempt: The id of the attempt that ended; None where none had begun.
    """

    code: int
    cause: Cause | None
    reason: str
    step: str
    key: str | None = None
    attempt: str | None = None

    @classmethod
    def from_exit_code(cls, step: str, code: int, reason: str = "", *, cause: Cause | None = None) -> Ending:
        """Build the ending of a process that wrote none, e.g. because it was killed: only its exit code is known."""
        if code == Exit.DONE:
            return cls(code, None, reason, step)
        by_code = _CAUSES[Exit(code)] if code in _CAUSES else Cause.KILLED if may_retry(code) else Cause.BUG
        return cls(code, cause or by_code, reason, step)

    @classmethod
    def from_process(cls, step: str, exit_code: int, step_ending: Ending | None, last_output: str = "") -> Ending:
        """Return the ending that a process wrote if it fits the exit code; otherwise build one from the exit code.

        Args:
            step: The step that ran.
            exit_code: The exit code of the process.
            step_ending: The ending that the process wrote; None where it wrote none.
            last_output: The end of its output, for a person.
        """
        # They differ where the process was killed after it wrote its ending; then the exit code is right.
        if step_ending is not None and step_ending.code == exit_code:
            return step_ending
        return cls.from_exit_code(step, exit_code, last_output)

    @classmethod
    def from_problem(cls, step: str, problem: Problem, *, key: str | None = None) -> Ending:
        """Build the ending that one of our own errors causes."""
        return cls(int(problem.exit_code), problem.cause, str(problem), step, key)

    @property
    def retry(self) -> bool:
        """Whether a runtime may run the same command again."""
        return may_retry(self.code) and self.cause not in _NEVER_RETRIED

    @property
    def kind(self) -> Kind:
        """What the ending means for the runtime that runs the step."""
        if self.code == Exit.DONE:
            return Kind.DONE
        if is_refusal(self.code):
            return Kind.REFUSED
        return Kind.RETRY if self.retry else Kind.ERROR

    def sentence(self) -> str:
        """Format it for a log that does not name the step: `validate_data: try again (75): ...`."""
        return f"{self.step}: {self.summary()}"

    def summary(self) -> str:
        """Format it for a place that names the step already: `try again (75): ...`."""
        return f"{describe(self.code)} ({self.code}): {_printable(self.reason)}".rstrip(": ")

    def as_json(self, *, limit_bytes: int | None = None) -> str:
        """Return the document on one line of at most `limit_bytes`; a reason that is too long is cut."""
        text = self._dump(self.reason)
        if limit_bytes is None or len(text.encode()) <= limit_bytes:
            return text

        room = limit_bytes - len(self._dump("").encode()) - len(" ...")
        # Characters that JSON escapes take up to six bytes, so the cut is by trial.
        size = max(0, room)
        while size and len(self._dump(self.reason[:size] + " ...").encode()) > limit_bytes:
            size -= max(1, size // 8)
        return self._dump(self.reason[:size] + " ...")

    def _dump(self, reason: str) -> str:
        fields: dict[str, Any] = {**asdict(self), "reason": _printable(reason), "kind": self.kind, "retry": self.retry}
        return json.dumps({name: fields[name] for name in _FIELDS}, ensure_ascii=False)


def _printable(reason: str) -> str:
    """Return a reason as pages, terminals and other tools may show it: a library's error may hold a presigned URL."""
    return uris.mask_secrets_of_errors(escape_controls(reason))


_FIELDS = ("code", "kind", "cause", "reason", "step", "key", "attempt", "retry")


def from_json(text: str | bytes) -> Ending | None:
    """Parse a document; return None where the text is not one."""
    try:
        fields = json.loads(text)
        cause = Cause(fields["cause"]) if fields["cause"] is not None else None
        key, attempt = (None if fields[name] is None else str(fields[name]) for name in ("key", "attempt"))
        return Ending(int(fields["code"]), cause, str(fields["reason"]), str(fields["step"]), key, attempt)
    # A library may print anything after the mark; the last two errors come from an infinite code and very deep JSON.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def from_line(line: str) -> Ending | None:
    """Parse the marked line of a step's output; return None for any other line."""
    return from_json(line[len(MARK) :]) if line.startswith(MARK) else None


def from_output(text: str) -> Ending | None:
    """Parse a pod's termination message: the document, or output with a marked line; None for any other text."""
    # Not `splitlines`, which also cuts at characters that JSON leaves as they are, such as U+2028.
    return from_json(text) or last_ending(text.split("\n"))


def last_ending(lines: Iterable[str]) -> Ending | None:
    """Parse the last marked line of a step's output; return None where there is none."""
    ending = None
    for line in lines:
        ending = from_line(line) or ending
    return ending
