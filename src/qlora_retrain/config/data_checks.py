"""The named checks of the data gate on what rows say: what each does unless a line says else.

`data.checks` sets them by name, e.g. `{emails: redact, mojibake: warn}`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# off: not looked for; warn: counted and shown; redact: what was matched is replaced by its kind, e.g. [email];
# drop: the row is kept out; refuse: the data is refused.
Severity = Literal["off", "warn", "redact", "drop", "refuse"]
_ALL: tuple[Severity, ...] = ("off", "warn", "redact", "drop", "refuse")
_NO_REDACTION: tuple[Severity, ...] = ("off", "warn", "drop", "refuse")


@dataclass(frozen=True, slots=True)
class Check:
    """What a check of the data gate does by default, and what it can do."""

    severity: Severity
    severities: tuple[Severity, ...] = _NO_REDACTION


CHECKS: Mapping[str, Check] = {
    # Secrets: whoever can ask the model can ask for them.
    "private_keys": Check("drop", _ALL),
    "access_keys": Check("drop", _ALL),
    "passwords": Check("drop", _ALL),
    # Personal data: what has a check digit is nearly certain, so it is kept out; the others are common in good data.
    "card_numbers": Check("drop", _ALL),
    "ibans": Check("drop", _ALL),
    "social_security_numbers": Check("drop", _ALL),
    "emails": Check("warn", _ALL),
    "phone_numbers": Check("warn", _ALL),
    "ip_addresses": Check("warn", _ALL),
    # Damaged and hidden text.
    "replacement_characters": Check("drop"),
    "mojibake": Check("drop"),
    "control_characters": Check("drop"),
    "bidi_characters": Check("drop"),
    "invisible_tags": Check("drop"),
    "no_visible_text": Check("drop"),
    "prompt_injection": Check("warn"),
    "other_languages": Check("warn"),
    # Decided where the files are read, so there is no row to learn with a warning.
    "repeated_headers": Check("drop", ("off", "drop", "refuse")),
    # Labels, where `data.task` is labels.
    "label_errors": Check("warn"),
    "misspelt_labels": Check("warn"),
    "personal_labels": Check("warn"),
    "unknown_golden_labels": Check("refuse", ("off", "warn", "refuse")),
    # Rows beside other rows.
    "near_evaluation": Check("drop"),
    "near_duplicates": Check("warn"),
}


def complete(settings: Mapping[str, Any]) -> dict[str, Severity]:
    """Return the severity of every check, in the order of `CHECKS`: the line's, else the default.

    Raises:
        ValueError: For a name that is no check, and for a severity that the check does not have.
    """
    result = {name: check.severity for name, check in CHECKS.items()}
    for name, value in settings.items():
        if name not in CHECKS:
            close = difflib.get_close_matches(name, CHECKS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(CHECKS)}"
            raise ValueError(f"no check has the name {name!r}; {hint}")
        # YAML reads `off` without quotes as false.
        severity = "off" if value is False else value
        if severity not in CHECKS[name].severities:
            raise ValueError(f"{name}: expected {', '.join(CHECKS[name].severities)}; found {value!r}")
        result[name] = severity
    return result
