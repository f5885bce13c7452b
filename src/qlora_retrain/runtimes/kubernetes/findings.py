"""The result of a check of a deployment: ok, a fault with its remedy, or not known with the reason.

`deploy-check` and `doctor` share it: the same page, the same JSON, the same exit code. One fault is enough for 12. What
is not known is no fault, because a read-only account cannot see everything.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from qlora_retrain.core.errors import Exit


class State(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    FAULT = "fault"
    UNKNOWN = "not known"


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence of a check.

    Attributes:
        check: The check's name.
        state: How it ended.
        message: Where, what was expected and what was found.
        remedy: What to do about it; empty where all is well.
    """

    check: str
    state: State
    message: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A named check.

    Attributes:
        name: Its name on the page.
        promise: What holds where it finds nothing.
        run: Returns the faults and what is not known.
    """

    name: str
    promise: str
    run: Callable[[], Iterable[Finding]]

    def findings(self) -> list[Finding]:
        """Run the check; return what it found, each sentence once, or that its promise holds."""
        return list(dict.fromkeys(self.run())) or [Finding(self.name, State.OK, self.promise)]


def fault(check: str, where: str, expected: str, actual: str, remedy: str) -> Finding:
    """Make the finding of a fault."""
    return Finding(check, State.FAULT, f"{where}: expected {expected}, found {actual}", remedy)


def unknown(check: str, reason: str, remedy: str = "") -> Finding:
    """Make the finding of a check that could not be made."""
    return Finding(check, State.UNKNOWN, reason, remedy)


def exit_code(findings: Iterable[Finding]) -> Exit:
    """Return 12 where there is a fault, otherwise 0."""
    return Exit.USAGE if any(finding.state is State.FAULT for finding in findings) else Exit.DONE


def as_text(title: str, findings: Sequence[Finding]) -> str:
    """Write the findings as one page, faults first."""
    order = [State.FAULT, State.UNKNOWN, State.OK]
    lines = [title, ""]
    for finding in sorted(findings, key=lambda finding: order.index(finding.state)):
        mark = finding.state.upper() if finding.state is State.FAULT else finding.state
        lines.append(f"  {mark:<10} {finding.check:<13} {finding.message}")
        lines += [f"  {'':<10} {'':<13} do: {finding.remedy}"] if finding.remedy else []
    counts = ", ".join(f"{sum(f.state is state for f in findings)} {state}" for state in reversed(order))
    return "\n".join([*lines, "", counts])


def as_document(title: str, findings: Sequence[Finding]) -> dict[str, object]:
    """Return the findings as a document for JSON."""
    return {"title": title, "exit_code": int(exit_code(findings)), "findings": [asdict(f) for f in findings]}
