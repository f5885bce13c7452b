"""The fields of the form for a run by hand: which knobs it shows, under which heading, and in which words.

Bounds, choices and help texts are the config's own (`params.py`). Here are only the words that a person reads who does
not know the YAML. The knob's name stays visible in the help text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qlora_retrain.core import uris
from qlora_retrain.core.arguments import MAX_REASON_CHARACTERS

TRAINING, DATA, QUALITY, PUBLISHING, RESUMING = (
    "Training",
    "Data gate",
    "Quality gate",
    "Publishing",
    "Finish another run",
)


@dataclass(frozen=True, slots=True)
class FormField:
    """How the form shows a knob.

    Attributes:
        section: The heading.
        title: The label beside the input.
    """

    section: str
    title: str


# In the order of the form.
KNOB_FIELDS: Final = {
    "train.learning_rate": FormField(TRAINING, "Learning rate"),
    "train.warmup_ratio": FormField(TRAINING, "Warm-up, as a share of the optimizer steps"),
    "train.warmup_steps": FormField(TRAINING, "Warm-up, in optimizer steps"),
    "train.rank": FormField(TRAINING, "Rank of the adapter"),
    "train.alpha": FormField(TRAINING, "Alpha: how strongly the adapter acts"),
    "train.epochs": FormField(TRAINING, "Epochs: passes over the training rows"),
    "train.max_steps": FormField(TRAINING, "Optimizer steps at most"),
    "train.micro_batch_size": FormField(TRAINING, "Rows in a micro-batch"),
    "train.global_batch_size": FormField(TRAINING, "Rows in an optimizer step"),
    "train.max_hours": FormField(TRAINING, "Time for training, in hours"),
    "data.max_quarantined_fraction": FormField(DATA, "Largest share of rows in quarantine"),
    "evaluate.allow_first_release": FormField(QUALITY, "Allow a first release, which no champion is compared with"),
    "evaluate.max_loss_to_champion": FormField(QUALITY, "Largest loss against the version in production"),
    "publish.promote_to": FormField(PUBLISHING, "Alias that moves to the new version"),
}

# The key of the XCom in which a task leaves its text for the run's note.
NOTE_KEY = "qlora_retrain_note"
DRY_RUN, REASON, RESUME_RUN = "dry_run", "reason", "resume_run"
# Without a section: Airflow shows such fields under "Run Parameters", the one group that is open from the beginning.
DRY_RUN_SCHEMA: Final[dict[str, Any]] = {
    "type": "boolean",
    "title": "Dry run",
    "description": "only say what would run and why, in the log of the task plan and in the run's note; no step "
    "starts, and no plan is kept",
}
REASON_SCHEMA: Final[dict[str, Any]] = {
    "type": ["null", "string"],
    "maxLength": MAX_REASON_CHARACTERS,
    "format": "multiline",
    "title": "Reason",
    "description": f"why you start this run, in at most {MAX_REASON_CHARACTERS} characters; it is shown in the run's "
    "note, and stands in the audit trail of the version that the run publishes",
}
RESUME_RUN_SCHEMA: Final[dict[str, Any]] = {
    "type": ["null", "string"],
    # A run of this store and no URI: a form must not say from where this platform reads, or with which secret.
    "pattern": r"^[0-9]{8}T[0-9]{6}Z-[0-9a-f]{12}$",
    "title": "Run to finish",
    "description": "the id of another run in the store, whose plan this run finishes; training, gates and publishing "
    "are then that run's, and only dry run and reason are taken from this form",
    "section": RESUMING,
}


def is_dry_run(form_values: Mapping[str, Any]) -> bool:
    """Return whether the form asks only what would run."""
    # Also past Airflow's check of the schema, only the one value starts nothing.
    return form_values.get(DRY_RUN) is True


def stated_reason(form_values: Mapping[str, Any]) -> str:
    """Return why a person started the run, on one line; empty where nobody said it.

    The text is a stranger's: what is not printable is written as its escape, and passwords in URLs are masked.
    """
    value = form_values.get(REASON)
    if not isinstance(value, str):
        return ""
    text = uris.mask_secrets_of_errors(" ".join(value.split()))
    escaped = (c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return "".join(escaped)[:MAX_REASON_CHARACTERS]
