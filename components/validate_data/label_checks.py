"""Check labels: rows whose label is probably wrong, misspelt labels, labels that name a person, unknown golden labels.

Evaluation rows are never dropped: an evaluation without the rows that a classifier finds odd would flatter every model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from components.validate_data.checks import Row
from components.validate_data.label_errors import find_label_errors
from components.validate_data.label_names import find_misspelt_labels, find_personal_labels, find_unknown_labels
from components.validate_data.redaction import redact
from components.validate_data.similar_rows import Texts
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import conversations

CHECKS = ("label_errors", "misspelt_labels", "personal_labels", "unknown_golden_labels")
_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Suspect:
    """A row whose label is probably wrong, with the label that a classifier would give it; both are redacted."""

    location: str
    label: str
    suggestion: str
    probability: float


def check_labels(rows: Sequence[Row], golden: Sequence[Row], config: DataConfig) -> list[Suspect]:
    """Note the rows that a check found, and return those whose label is probably wrong, the most probable first.

    Raises:
        UsageError: If a golden label is nowhere in the data, unless `data.checks` allows it.
    """
    if config.task != "labels":
        return []
    rows = [row for row in rows if row.split in ("train", "eval")]
    labels = [conversations.answer_of(row.messages) for row in rows]
    counts = Counter(labels)
    _check_golden(golden, counts, config)

    misspelt: dict[str, str] = {}
    if config.checks["misspelt_labels"] != "off":
        misspelt = {similar.label: similar.target for similar in find_misspelt_labels(counts)}
        _note(rows, [label in misspelt for label in labels], "misspelt_labels", config)
    if config.checks["personal_labels"] != "off":
        personal = set(find_personal_labels(counts))
        _note(rows, [label in personal for label in labels], "personal_labels", config)
    if config.checks["label_errors"] == "off":
        return []

    # A misspelt label is the one that was meant here, so that the classifier does not find it a second time.
    corrected_labels = [misspelt.get(label, label) for label in labels]
    errors = find_label_errors(Texts(rows), corrected_labels, config.label_error_threshold).errors
    wrong = {error.row for error in errors}
    _note(rows, [i in wrong for i in range(len(rows))], "label_errors", config)
    ordered = sorted(errors, key=lambda error: (-error.probability, error.row))
    return [
        Suspect(rows[e.row].location, redact(labels[e.row]), redact(e.suggestion), round(e.probability, 4))
        for e in ordered
    ]


def _check_golden(golden: Sequence[Row], counts: Counter[str], config: DataConfig) -> None:
    severity = config.checks["unknown_golden_labels"]
    # Data without a row has its own refusal.
    if severity == "off" or not counts:
        return
    rows_by_label: dict[str, list[Row]] = {}
    for row in golden:
        rows_by_label.setdefault(conversations.answer_of(row.messages), []).append(row)
    unknown = find_unknown_labels(rows_by_label, counts)
    for label in unknown:
        for row in rows_by_label[label]:
            row.hits += ("unknown_golden_labels",)
    if not unknown:
        return

    named = [
        f'{rows_by_label[label][0].location}: "{redact(label)}"' + (f" (did you mean {redact(near)}?)" if near else "")
        for label, near in list(unknown.items())[:_MAX_NAMED]
    ]
    ending = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
    text = f"golden_data: labels that are nowhere in the data, so no model can learn them: {'; '.join(named)}{ending}"
    if severity == "refuse":
        raise UsageError(f"{text}; correct them, or set data.checks: {{unknown_golden_labels: warn}}")
    progress.say(text)


def _note(rows: Sequence[Row], is_hit: Sequence[bool], name: str, config: DataConfig) -> None:
    for row, hit in zip(rows, is_hit, strict=True):
        if hit:
            row.hits += (name,)
            is_refused = config.checks[name] == "refuse"
            if is_refused or (config.checks[name] == "drop" and row.split == "train"):
                row.reason, row.split = name, None
