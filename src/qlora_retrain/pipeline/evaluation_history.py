"""The evaluation history of a line: digests of every prompt that a data set of the line had in its evaluation.

    histories/<line>/<sha256>.txt                a history, named by the hash of its bytes: sorted lines
    histories/<line>/datasets/<time>-<key>.json  a data set that a plan of the line was made for, and its history

The planner alone writes both, before the plan. The line's history is the union of these histories and of what its data
sets evaluated (`evaluated_prompts.txt`). It only grows, so the order of plans does not matter, nor that two are made at
once. Its lines hold digests and no text; `components/validate_data/evaluated_before.py` writes and reads them.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from qlora_retrain.core import graph, hashing, json_lines
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.pipeline.planned_steps import PinnedHistory
from qlora_retrain.storage import artifact, keys, signatures
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.signatures import Signed
from qlora_retrain.storage.store import AlreadyExists, NotFound, Store, root_option

_FOLDER = "histories"
_DATASET = "dataset"
_CHAT = "chat "
_LINE = re.compile(rf"(?:beginning|{_CHAT.strip()}|group) [0-9a-f]{{16}}")
_RECORD_NAME = re.compile(r"\d{8}T\d{6}Z-([0-9a-f]{64})\.json")
_RECORD_ADVICE = "bring back what the planner wrote there, or remove it where somebody else did"
Lines = frozenset[str]
_NO_LINES: Lines = frozenset()


class DatasetRecord(Signed):
    """A data set that a plan of the line was made for.

    Attributes:
        dataset: Its key.
        history: The prompts that it keeps out of training; None: there were none.
        joined: The keys of earlier data sets whose records need not be read any more: `history` has all of them.
    """

    schema_version: Literal[1] = 1
    line: str
    dataset: str
    history: PinnedHistory | None
    joined: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """A record with what its data set must not train on later: its history, and what it evaluated itself."""

    record: DatasetRecord
    lines: Lines
    is_made: bool


@dataclass(frozen=True, slots=True)
class EvaluationHistory:
    """What a line has evaluated until now.

    Attributes:
        lines: The lines of the history.
        joined: The keys of the data sets whose evaluation is in it.
        planned: The keys of all data sets that plans of the line were made for.
        reusable: The records of data sets that trained on nothing of it: what they do not keep out, they evaluate.
    """

    lines: Lines
    joined: frozenset[str]
    planned: frozenset[str]
    reusable: tuple[DatasetRecord, ...]

    def choose(self, dataset_key: Callable[[PinnedHistory | None], str]) -> PinnedHistory | None:
        """Return the history to pin: that of a data set which can be used again, else all that is remembered.

        A data set's own evaluation would otherwise become a new input of the same data, and it would be made again.

        Args:
            dataset_key: Returns the key that the data set has with a given history.
        """
        for record in self.reusable:
            if dataset_key(record.history) == record.dataset:
                return record.history
        return _pin(self.lines)

    def refuse_forgotten(self, store: Store, line: str, dataset_key: str | None) -> None:
        """Refuse to plan where the record of the data set behind the version in production is gone.

        Raises:
            IntegrityError: If that data set was made with a history, or could have been, and has no record.
        """
        if dataset_key is None or dataset_key in self.planned:
            return
        manifest = artifact.find_manifest(store, _DATASET, dataset_key)
        # Earlier releases had no histories.
        if manifest is not None and graph.HISTORY in manifest.inputs:
            raise IntegrityError(
                f"{store.uri}/{_records_folder(line)}: has no record of the data set {dataset_key[:12]}, which the "
                "version in production was trained on: what the line has evaluated is forgotten; bring the folder "
                f"back, or go on without: qlora-retrain drop {_DATASET} {dataset_key} {root_option(store)}"
            )

    def write(self, store: Store, plan: Plan) -> None:
        """Write the history that a plan pins, and a record of the data set that its run will make.

        Called before the plan is written, so that no data set of a run is forgotten.

        Raises:
            IntegrityError: If something else is in the history's place.
        """
        key = plan.step(graph.producer_name(_DATASET)).key
        if key in self.planned:
            return
        if plan.history:
            _write_pinned(store, plan.line, plan.history, _to_bytes(self.lines))
        path = f"{_records_folder(plan.line)}/{plan.stamp}-{key}.json"
        record = DatasetRecord(line=plan.line, dataset=key, history=plan.history, joined=tuple(sorted(self.joined)))
        record = signatures.sign(store, path, record, keys.PLANNER)
        # Another plan of the same second and the same data set remembers as much.
        with contextlib.suppress(AlreadyExists):
            store.write_if_absent(path, record.model_dump_json(indent=1).encode())

    def lend(self, store: Store, line: str, plan: Plan) -> None:
        """Write the history that a lab's plan pins where its runs read it; nothing is remembered of them.

        Args:
            store: The store.
            line: The line that is tried out, which another line's name in the plan stands for.
            plan: The lab's plan.
        """
        if plan.history is None:
            return
        # The line's own plan may have pinned an older history, which is in the store.
        try:
            data = store.read(history_path(line, plan.history)).data
        except NotFound:
            data = _to_bytes(self.lines)
        _write_pinned(store, plan.line, plan.history, data)


def read(store: Store, line: str, history_of: str | None = None) -> EvaluationHistory:
    """Return what a line has evaluated, and what the line did that `data.history_of` names.

    Raises:
        UsageError: If that line has no history.
        IntegrityError: If a record, a history or a data set is not what the planner or the data gate wrote.
    """
    parts = list(_read_parts(store, line))
    lines = _NO_LINES.union(*(part.lines for part in parts))
    if history_of is not None:
        lines = lines.union(*(part.lines for part in _read_other_line(store, history_of)))

    joined = {key for part in parts for key in part.record.joined}
    joined.update(part.record.dataset for part in parts if part.is_made)
    planned = {match[1] for match in map(_RECORD_NAME.fullmatch, _record_names(store, line)) if match}
    reusable = tuple(part.record for part in parts if part.lines == lines)
    return EvaluationHistory(lines, frozenset(joined), frozenset(planned), reusable)


def history_path(line: str, history: PinnedHistory) -> str:
    """Return where a history of a line is in the store."""
    return f"{_FOLDER}/{line}/{history.sha256}.txt"


def as_file(history: PinnedHistory) -> File:
    """Return the file of which the source consists, as the step gets it."""
    return File(path=graph.EVALUATED_PROMPTS, size_bytes=history.size_bytes, sha256=history.sha256)


def read_pinned(store: Store, line: str, history: PinnedHistory) -> bytes:
    """Return the bytes of a history that a plan or a record pins.

    Raises:
        IntegrityError: If they are others, or missing.
    """
    path = history_path(line, history)
    try:
        data = store.read(path).data
        actual = hashing.sha256_bytes(data)
        fault = "" if actual == history.sha256 else f"expected sha256 {history.sha256[:12]}, found {actual[:12]}"
    except NotFound:
        fault = "missing"
    if fault:
        raise IntegrityError(
            f"{store.uri}/{path}: {fault}: without it, prompts that line {line} has evaluated could be trained on; "
            "bring the file back from a backup or an earlier version of it, or begin anew with a line of another name"
        )
    return data


def _read_parts(store: Store, line: str) -> Iterator[_Part]:
    """Yield what is remembered of each data set, the newest first, without those that a newer one has joined."""
    joined: set[str] = set()
    for name in sorted(_record_names(store, line), reverse=True):
        match = _RECORD_NAME.fullmatch(name)
        if match is None or match[1] in joined:
            continue
        record = _read_record(store, line, name)
        joined.update(record.joined)
        history = record.history
        lines = _parse(store, history_path(line, history), read_pinned(store, line, history)) if history else _NO_LINES
        evaluated = _read_evaluated(store, record.dataset)
        yield _Part(record, lines | (evaluated or _NO_LINES), evaluated is not None)


def _read_other_line(store: Store, line: str) -> list[_Part]:
    if parts := list(_read_parts(store, line)):
        return parts
    lines = list(store.children(_FOLDER))
    near = difflib.get_close_matches(line, lines, n=1)
    hint = f"did you mean {near[0]}?" if near else f"lines that have one: {', '.join(lines) or 'none'}"
    raise UsageError(f"data.history_of: line {line} has no evaluation history in {store.uri}; {hint}")


def _read_record(store: Store, line: str, name: str) -> DatasetRecord:
    path = f"{_records_folder(line)}/{name}"
    try:
        record = signatures.parse(store, path, store.read(path).data, DatasetRecord, keys.PLANNER)
    except (NotFound, ValueError) as error:
        raise IntegrityError(f"{store.uri}/{path}: is no record of a data set; {_RECORD_ADVICE}") from error
    signatures.refuse_unverified(store, path, record.signature)
    if record.line != line or not name.endswith(f"-{record.dataset}.json"):
        raise IntegrityError(
            f"{store.uri}/{path}: is the record of {record.line} {record.dataset[:12]}; {_RECORD_ADVICE}"
        )
    return record


def _read_evaluated(store: Store, key: str) -> Lines | None:
    """Return what a data set evaluated; nothing of a refused one; None while it is not made."""
    manifest = artifact.find_manifest(store, _DATASET, key)
    if manifest is None:
        return None
    file = next((file for file in manifest.files if file.path == graph.EVALUATED_PROMPTS), None)
    if file is None or manifest.outcome != "done":
        return _NO_LINES
    path = f"{manifest.prefix}/{file.path}"
    try:
        data = store.read(path).data
    except NotFound:
        raise artifact.corruption_error(store, manifest, f"{file.path}: missing") from None
    if hashing.sha256_bytes(data) != file.sha256:
        raise artifact.corruption_error(store, manifest, f"{file.path}: its sha256 differs from the manifest's")
    return _parse(store, path, data)


def _record_names(store: Store, line: str) -> Iterator[str]:
    return store.children(_records_folder(line))


def _records_folder(line: str) -> str:
    return f"{_FOLDER}/{line}/datasets"


def _write_pinned(store: Store, line: str, history: PinnedHistory, data: bytes) -> None:
    with contextlib.suppress(AlreadyExists):
        store.write_if_absent(history_path(line, history), data)
    read_pinned(store, line, history)  # which refuses what somebody else has put there


def _pin(lines: Lines) -> PinnedHistory | None:
    if not lines:
        return None
    data = _to_bytes(lines)
    num_chats = sum(line.startswith(_CHAT) for line in lines)
    return PinnedHistory(sha256=hashing.sha256_bytes(data), size_bytes=len(data), chats=num_chats)


def _to_bytes(lines: Lines) -> bytes:
    return "".join(f"{line}\n" for line in sorted(lines)).encode()


def _parse(store: Store, path: str, data: bytes) -> Lines:
    """Return the lines of a document.

    Raises:
        IntegrityError: If one of them is no digest.
    """
    lines = frozenset(json_lines.split_lines(data.decode("ascii", errors="replace")))
    if not all(map(_LINE.fullmatch, lines)):
        raise IntegrityError(f"{store.uri}/{path}: a line is no digest; expected e.g. {_CHAT}0123456789abcdef")
    return lines
