"""What a person asks an alias to do, and the command lines that ask for it, to be copied into a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage.store import Store

# Of an alias that was never set. No version is called so, since each begins with its time.
NOTHING = "none"
REQUEST_PATTERN = r"[0-9a-f]{12,64}"


@dataclass(frozen=True, slots=True)
class Request:
    """A move that a person asks for.

    Attributes:
        line: The line.
        alias: The alias that moves.
        reason: The reason, for the audit trail.
        current: The version that the alias named when the person decided; `none`: no version; None: any.
        request_id: Hexadecimal digits by which a repeated request finds what it did; None: it is never repeated.
    """

    line: str
    alias: str
    reason: str
    current: str | None = None
    request_id: str | None = None

    def __post_init__(self) -> None:
        # It is a part of the name of the move's audit entry: another one would damage the trail.
        if self.request_id is not None and not re.fullmatch(REQUEST_PATTERN, self.request_id):
            raise UsageError(f"--request {self.request_id}: expected 12 to 64 hexadecimal digits in small letters")


def command(store: Store, request: Request, verb: str, *arguments: str) -> str:
    """Return the command line that makes a move from the version that a request names."""
    further = ["--request", request.request_id] if request.request_id else []
    return _join(store, request, [verb], arguments, [*further, "--from", request.current or NOTHING])


def command_to_reject(store: Store, request: Request, version: str) -> str:
    """Return the command line that rejects a version for the reason of a request."""
    return _join(store, request, ["models", "reject"], [version], [])


def _join(store: Store, request: Request, verb: list[str], arguments: Iterable[str], further: list[str]) -> str:
    # A reason that begins with a hyphen would be taken for an option.
    reason = [f"--reason={request.reason}"] if request.reason.startswith("-") else ["--reason", request.reason]
    words = ["qlora-retrain", *verb, request.line, *arguments, "--alias", request.alias, *reason]
    return shlex.join([*words, "--root", store.uri, *further])
