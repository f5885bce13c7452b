"""What a person asks for on the form of `qlora-retrain-move`, as data: which alias of a line goes where, and why.

Nothing of the form is a setting, an address or a gate: a move is one that `qlora-retrain promote` or `rollback` would
make, of a version that a run has published. It imports no Airflow, because the DAG of each line reads the names here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_retrain.core.aliases import PRODUCTION
from qlora_retrain.core.errors import UsageError

MOVE_DAG = "qlora-retrain-move"
APPROVAL_DAG = "qlora-retrain-approval"
DAG_IDS = (MOVE_DAG, APPROVAL_DAG)  # a line of one of these names would take its DAG away

_VERSION = r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12}"
_LINE_FIELD = {
    "type": "string",
    "pattern": r"^[a-z][a-z0-9-]{0,61}[a-z0-9]$",
    "title": "line",
    "description": "the line's name",
}
_CURRENT_FIELD = {
    "type": "string",
    "pattern": rf"^({_VERSION}|none)$",
    "title": "from_version",
    "description": "the version that the alias names now; none: no version. If it has moved, nothing happens",
}
_REASON_FIELD = {
    "type": "string",
    "minLength": 1,
    "maxLength": 500,
    "title": "reason",
    "description": "a sentence for the audit trail",
}
# Name -> JSON schema; none of them has a default.
MOVE_FIELDS: dict[str, dict[str, Any]] = {
    "line": _LINE_FIELD,
    "action": {
        "type": "string",
        "enum": ["promote", "rollback"],
        "title": "action",
        "description": "promote: point the alias at the version; rollback: go back, and reject what it leaves",
    },
    "from_version": _CURRENT_FIELD,
    "reason": _REASON_FIELD,
}
OPTIONAL_MOVE_FIELDS: dict[str, dict[str, Any]] = {
    "version": {
        "type": ["null", "string"],
        "pattern": rf"^{_VERSION}$",
        "title": "version",
        "description": "the version to promote, or that a rollback goes back to; empty, for a rollback: the one before",
    },
    "alias": {
        "type": ["null", "string"],
        "pattern": r"^[a-z][a-z0-9-]{0,31}$",
        "title": "alias",
        "description": "empty: the line's publish.promote_to, and production where it has none",
    },
}
APPROVAL_FIELDS: dict[str, dict[str, Any]] = {
    "line": _LINE_FIELD,
    "version": {
        "type": "string",
        "pattern": rf"^{_VERSION}$",
        "title": "version",
        "description": "the version that is to become production; staging must name it",
    },
    "from_version": {**_CURRENT_FIELD, "description": "the version in production that it was judged against, or none"},
}


@dataclass(frozen=True, slots=True)
class Movement:
    """A move of an alias that a person decided on.

    Attributes:
        line: The line.
        action: Where the alias goes: to a version, or back.
        version: The version that it goes to; None, of a rollback: the one before.
        current: The version that it named when the person decided, or `none`.
        alias: The alias.
        reason: The reason, in the person's words.
        user: The user of Airflow who decided; None: nobody, as where a schedule started the run.
    """

    line: str
    action: Literal["promote", "rollback"]
    version: str | None
    current: str
    alias: str
    reason: str
    user: str | None

    @classmethod
    def from_form(cls, form: Mapping[str, Any], promote_to: str | None, user: str | None) -> Movement:
        """Return what the form of a DAG run asks for.

        Args:
            form: The run's fields, which Airflow has checked against their schemas.
            promote_to: The line's own alias.
            user: The user of Airflow who started the run.

        Raises:
            UsageError: For a name that is no field: a call of the REST API that asks for more would get it in silence.
        """
        fields = {*MOVE_FIELDS, *OPTIONAL_MOVE_FIELDS}
        if unknown := sorted(set(form) - fields):
            raise UsageError(f"{', '.join(unknown)}: not in the form, which has {', '.join(sorted(fields))}")
        return cls(
            line=form["line"],
            action=form["action"],
            version=form.get("version"),
            current=form["from_version"],
            alias=form.get("alias") or promote_to or PRODUCTION,
            reason=form["reason"],
            user=user,
        )

    def command(self, root: str, origin: str, request_id: str, actor: list[str]) -> list[str]:
        """Return the arguments of `qlora-retrain` that make this move.

        Args:
            root: The store.
            origin: The DAG run, for the audit trail.
            request_id: By which a repeated command finds what it did.
            actor: The arguments that say who decided.
        """
        target = [self.version or ""] if self.action == "promote" else []
        # With `=`, so that no text of a person can pass for an option.
        back_to = [f"--to={self.version}"] if self.action == "rollback" and self.version else []
        return [
            self.action, self.line, *target, *back_to, f"--root={root}", f"--alias={self.alias}",
            f"--from={self.current}", f"--request={request_id}", f"--reason={self.reason} ({origin})", *actor,
        ]  # fmt: skip


def request_id(run_id: str) -> str:
    """Return the id of the move of a DAG run, which is the same for each of its tries.

    Args:
        run_id: The DAG run's id in the store.
    """
    return hashlib.sha256(run_id.encode()).hexdigest()[:32]
