"""Read the rows of the gate's sources, and put each row on its side: train, eval, golden or kept out."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from components.validate_data.checks import Row, check_row, explain_fault
from components.validate_data.encoding import encode_rows
from components.validate_data.evaluated_before import History, keep_out_evaluated
from components.validate_data.files import UnusableFiles
from components.validate_data.judge_rows import judge_by_training_rows
from components.validate_data.label_checks import Suspect, check_labels
from components.validate_data.language_checks import check_languages
from components.validate_data.raw_rows import RowReader
from components.validate_data.repeats import quarantine_repeats
from components.validate_data.replay import SOURCE, choose_replay, replay_settings
from components.validate_data.row_checks import check_texts
from components.validate_data.similar_rows import check_similar_rows
from components.validate_data.sizes import explain_too_long, refuse_few_golden_rows
from components.validate_data.splitting import (
    as_fraction,
    assign_splits,
    find_openings,
    keep_apart,
    reserve_evaluation,
)
from components.validate_data.text_file import TextFile
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm.chat import ChatTokenizer

_TRAINED_SOURCES = ("raw_data", SOURCE)


@dataclass(slots=True)
class SourceRows:
    """The rows of one source, and what was noticed when they were read.

    Attributes:
        rows: Every row, bad ones included.
        layouts: What was taken as the chat, by file.
        unread: The text columns that nothing reads, with the number of rows that fill each.
        warnings: Sentences about what may be wrong.
    """

    rows: list[Row] = field(default_factory=list)
    layouts: dict[str, str] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GateRows:
    """Every row that the gate has read, with its side or its reason.

    Attributes:
        sources: By source: `raw_data`, and where the line has them `golden_data`, `eval_data` and `replay_data`.
        rows: The rows of `raw_data` and `eval_data`, as the limits count them.
        eval_fraction: A row whose hash is below this is evaluation; None where `eval_data` is the evaluation.
        shared_openings: The beginnings that do not decide a chat's side, as digests; None likewise.
        fractions: The hashes of the rows that were split, to say what another fraction would give.
        languages: The number of training and evaluation rows of each language, as far as it was guessed.
        suspects: The rows whose label is probably wrong.
    """

    sources: dict[str, SourceRows]
    rows: list[Row]
    eval_fraction: float | None
    shared_openings: tuple[str, ...] | None
    fractions: Sequence[float]
    languages: dict[str, int] = field(default_factory=dict)
    suspects: list[Suspect] = field(default_factory=list)

    @property
    def golden(self) -> list[Row]:
        """Return the golden rows."""
        rows = self.sources["golden_data"].rows if "golden_data" in self.sources else []
        return [row for row in rows if not row.reason]

    @property
    def replay(self) -> list[Row]:
        """Return the rows of `replay_data`; those that train are of the side `train`."""
        return self.sources[SOURCE].rows if SOURCE in self.sources else []

    def by_split(self) -> dict[str, list[Row]]:
        """Return the rows of each file of the dataset, by its name."""
        sides = {split: [row for row in self.rows if row.split == split] for split in ("train", "eval")}
        return sides | {"golden": self.golden}


def read_gate_rows(
    config: DataConfig,
    tokenizer: ChatTokenizer,
    raw_data: Path,
    golden_data: Path | None,
    eval_data: Path | None,
    history: History = frozenset(),
    work: Path | None = None,
    replay_data: Path | None = None,
) -> GateRows:
    """Read all rows and decide about each.

    Args:
        config: What the line says about its data.
        tokenizer: The base model's, with the line's chat format.
        raw_data: The folder of files to train on.
        golden_data: The golden rows, if the line has some.
        eval_data: The evaluation, if the line names it.
        history: The prompts that the line has evaluated before.
        work: A folder on the disk that takes the rows' texts meanwhile.
        replay_data: The folder of general examples that train beside the line's own, if the line has some.

    Raises:
        UsageError: For a file that cannot be read, a bad row of `golden_data` or `eval_data`, or a chat template that
            can carry no row.
    """
    # The reserved rows are read first, since they are few, and one that is bad ends the step.
    texts = TextFile(work or Path(tempfile.gettempdir()))
    sources: dict[str, SourceRows] = {}
    faults: dict[str, str] = {}
    folders = {"golden_data": golden_data, "eval_data": eval_data, "raw_data": raw_data, SOURCE: replay_data}
    for source, folder in folders.items():
        read = _read_source if source in _TRAINED_SOURCES else _read_reserved
        settings = replay_settings(config) if source == SOURCE else config
        try:
            sources |= {source: read(folder, source, settings, tokenizer, texts)} if folder else {}
        except UnusableFiles as error:
            faults[source] = str(error)
    if faults:
        # Files of two sources may have one name.
        messages = [text if text.startswith(f"{source}: ") else f"{source}: {text}" for source, text in faults.items()]
        raise UsageError("\n".join(messages) if len(messages) > 1 else next(iter(faults.values())))

    rows = sources["raw_data"].rows
    openings = find_openings(rows, config)
    for source, reason in (("golden_data", "in_golden_set"), ("eval_data", "in_eval_data")):
        if source in sources:
            reserved = [row for row in sources[source].rows if not row.reason]
            keep_apart(rows, reserved, reason, config, openings)
            if source == "golden_data":
                refuse_few_golden_rows(reserved, config)
    quarantine_repeats(rows, config)
    golden = [row for row in sources["golden_data"].rows if not row.reason] if golden_data else []

    if eval_data is None:
        eval_fraction = assign_splits(rows, config, openings)
        keep_out_evaluated(rows, history, config, openings)
        # A row's prompt is named by the hash that puts it on its side.
        fractions = array("d", (as_fraction(row.prompt_id) for row in rows if row.split))
        judge_by_training_rows(rows, golden, config)
        languages, suspects = _check_sides(rows, golden, config)
        _choose_replay(sources, rows, history, config, openings)
        return GateRows(sources, rows, eval_fraction, openings, fractions, languages, suspects)

    # The file is the evaluation, so no row of the others is kept from training, except by a lab.
    if config.judge_fraction is None:
        for row in rows:
            row.split = None if row.reason else "train"
    else:
        assign_splits(rows, config.model_copy(update={"eval_fraction": 0.0}), openings)
    keep_out_evaluated(rows, history, config, openings)
    reserve_evaluation(sources["eval_data"].rows, config)
    rows = [*rows, *sources["eval_data"].rows]
    judge_by_training_rows(rows, golden, config)
    languages, suspects = _check_sides(rows, golden, config)
    _choose_replay(sources, rows, history, config, openings)
    return GateRows(sources, rows, None, None, [], languages, suspects)


def _choose_replay(
    sources: Mapping[str, SourceRows],
    rows: Sequence[Row],
    history: History,
    config: DataConfig,
    openings: Collection[str],
) -> None:
    if SOURCE in sources:
        # A lab takes the golden rows out of the data set, and no row that trains may be near them even so.
        golden = sources["golden_data"].rows if "golden_data" in sources else []
        golden = [row for row in golden if row.reason in (None, "in_golden_set")]
        choose_replay(sources[SOURCE].rows, rows, golden, history, config, openings)


def _check_sides(
    rows: Sequence[Row], golden: Sequence[Row], config: DataConfig
) -> tuple[dict[str, int], list[Suspect]]:
    """Check the rows beside each other, now that each has its side; return their languages and the odd labels."""
    languages = check_languages(rows, config)
    suspects = check_labels(rows, golden, config)
    check_similar_rows(rows, golden, config)
    return languages, suspects


def _read_source(
    folder: Path, source: str, config: DataConfig, tokenizer: ChatTokenizer, texts: TextFile
) -> SourceRows:
    reader = RowReader(folder, config, source)
    rows: list[Row] = []
    checked = check_texts(
        (check_row(raw, config) for raw in reader.rows()), config, is_reserved=source not in _TRAINED_SOURCES
    )
    for row in checked:
        row.store_texts(texts)
        rows.append(row)
    encode_rows(rows, config, tokenizer, source)
    return SourceRows(rows, reader.layouts, reader.unread, reader.warnings)


def _read_reserved(
    folder: Path, source: str, config: DataConfig, tokenizer: ChatTokenizer, texts: TextFile
) -> SourceRows:
    """Return the rows of a file that a person chose. A bad one is an error, since nobody would miss it.

    Evaluation files often hold a row twice, so a repeated one is left out there; golden rows are few and chosen.
    """
    result = _read_source(folder, source, config, tokenizer, texts)
    quarantine_repeats(result.rows, config)

    tolerated = {"not_kept"} | ({"exact_duplicate"} if source == "eval_data" else set())
    tolerated |= {"repeated_headers"} if config.checks["repeated_headers"] == "drop" else set()
    bad_rows = [row for row in result.rows if row.reason and row.reason not in tolerated]
    if bad_rows:
        length = explain_too_long(result.rows, config)
        fault = explain_fault(bad_rows[0], config) + (f"; {length}" if length else "")
        raise UsageError(f"{source}: {fault} ({len(bad_rows)} of {len(result.rows)} rows to correct)")

    # Both sources may have files of the same name, and a row must be found again.
    for row in result.rows:
        row.file = f"{source}/{row.file}"
    return result
