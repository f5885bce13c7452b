"""What a store's plans, aliases and versions still name, and which versions of a line stay.

A plan counts for 30 days after it was made, and for 30 days after anything of its run was written. The newest plan of a
line that has versions counts for ever: it says how many of them stay (`publish.keep`), together with every other plan
of the line that counts, the largest number of all. So one run with a smaller number removes nothing.

Whatever looks like a key, a hash or a version in the bytes of such a plan is named by it, of whatever release of this
code it is. A document that somebody else wrote can so keep garbage, and can never make a collection remove something.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from qlora_retrain.config.publish import KeepConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.pipeline.evaluation_history import DatasetRecord
from qlora_retrain.pipeline.line_versions import LineVersions, read_line_versions
from qlora_retrain.pipeline.plan import Plan, plan_path
from qlora_retrain.pipeline.stored_names import STAMPED, Documents, hashes_in, stamped_in, time_of
from qlora_retrain.storage import keys, signatures
from qlora_retrain.storage.store import Entry, NotFound, Store

PLAN_DAYS = 30
_RECORD = re.compile(r"([0-9]{8}T[0-9]{6}Z)-([0-9a-f]{64})\.json")


@dataclass(frozen=True, slots=True)
class Names:
    """What is named.

    Attributes:
        hashes: Every hash: keys of artifacts, hashes of contents.
        runs: The runs that stay.
        counting: The runs whose plans count.
        lines: The versions of each line.
        notes: What was left because it could not be decided, in sentences.
    """

    hashes: frozenset[str]
    runs: frozenset[str]
    counting: frozenset[str]
    lines: Mapping[str, LineVersions]
    notes: tuple[str, ...]

    @property
    def stamps(self) -> frozenset[str]:
        """The times of the plans that count; a version that a run is writing begins with it."""
        return frozenset(run.partition("-")[0] for run in self.counting)


def list_runs(store: Store) -> dict[str, list[Entry]]:
    """Return the files of every run, by the run's id."""
    runs: dict[str, list[Entry]] = defaultdict(list)
    for entry in store.list("runs"):
        runs[entry.path.split("/")[1]].append(entry)
    return dict(runs)


def read_names(documents: Documents, at: datetime) -> Names:
    """Read what is named at a time.

    Raises:
        UsageError: If plans are signed, and this process has no keys of the store to check them with.
    """
    store = documents.store
    runs = list_runs(store)
    counting = {run for run, entries in runs.items() if _counts(run, entries, at)}
    lines = list(store.children("models"))
    policies, newest_runs = _policies(documents, runs, counting, lines)
    counting |= newest_runs

    plans = [documents.read(entry) for run in counting for entry in runs[run] if entry.path == plan_path(run)]
    hashes, versions = hashes_in(*plans), stamped_in(*plans)
    versions |= _published_by(documents, hashes)
    by_line = {line: read_line_versions(documents, line, policies.get(line), hashes, versions, at) for line in lines}
    for line in by_line.values():
        hashes |= hashes_in(*line.manifests)
    notes = [note for line in by_line.values() for note in line.notes]
    notes += [f"runs/{run}: is no name of a run; it stays" for run in runs if not STAMPED.fullmatch(run)]
    kept_runs = stamped_in(*(text for line in by_line.values() for text in line.manifests))
    return Names(
        hashes=frozenset(hashes | _datasets_to_remember(store, at)),
        runs=frozenset(counting | kept_runs),
        counting=frozenset(counting),
        lines=by_line,
        notes=tuple(notes),
    )


def _counts(run: str, entries: Iterable[Entry], at: datetime) -> bool:
    """Return whether a run's plan counts by its age; a run of another name may be of any age."""
    begins_at = at - timedelta(days=PLAN_DAYS)
    if not STAMPED.fullmatch(run) or time_of(run) > begins_at:
        return True
    # A step writes its progress every few seconds, and whoever begins an old run again writes that it goes on.
    return max(entry.modified_at for entry in entries) > begins_at.timestamp()


def _policies(
    documents: Documents, runs: Mapping[str, list[Entry]], counting: set[str], lines: Iterable[str]
) -> tuple[dict[str, KeepConfig], set[str]]:
    """Return how many versions of each line stay, and the newest run of each line without a plan that counts."""
    policies: dict[str, KeepConfig] = {}
    for run in counting:
        if policy := _verified_policy(documents, run, runs[run]):
            line, keep = policy
            policies[line] = _longest(policies.get(line), keep)

    missing, newest_runs = set(lines) - policies.keys(), set[str]()
    for run in sorted(runs.keys() - counting, reverse=True):
        if not missing:
            break
        policy = _verified_policy(documents, run, runs[run])
        if policy is not None and policy[0] in missing:
            line, keep = policy
            policies[line] = keep
            newest_runs.add(run)
            missing.remove(line)
    return policies, newest_runs


def _verified_policy(documents: Documents, run: str, entries: Iterable[Entry]) -> tuple[str, KeepConfig] | None:
    """Return the line of a run's plan, and how many of its versions stay; None where no plan says so that counts."""
    store, path = documents.store, plan_path(run)
    text = next((documents.read(entry) for entry in entries if entry.path == path), "")
    if not text:
        return None
    # A plan of another release, or one that the planner did not sign, still keeps what it names.
    with contextlib.suppress(IntegrityError, ValueError, TypeError, StopIteration):
        plan = signatures.parse(store, path, text.encode(), Plan, keys.PLANNER)
        signatures.refuse_unverified(store, path, plan.signature)
        return plan.line, _keep(plan)
    return None


def _keep(plan: Plan) -> KeepConfig:
    config = plan.step(graph.producer_name("release")).config
    # Plans of before this setting take its default; a later release may say more of it.
    keep = dict(config.get("keep", {}))
    return KeepConfig.model_validate({name: keep[name] for name in KeepConfig.model_fields if name in keep})


def _longest(policy: KeepConfig | None, further: KeepConfig) -> KeepConfig:
    if policy is None:
        return further
    return KeepConfig(versions=max(policy.versions, further.versions), days=max(policy.days, further.days))


def _published_by(documents: Documents, hashes: set[str]) -> set[str]:
    """Return the versions of the artifacts `release` that plans name: a plan that finds one publishes nothing again."""
    manifests = {f"artifacts/release/{key}/_manifest.json" for key in hashes}
    entries = documents.store.list("artifacts/release")
    return stamped_in(*(documents.read(entry) for entry in entries if entry.path in manifests))


def _datasets_to_remember(store: Store, at: datetime) -> set[str]:
    """Return the keys of the data sets whose evaluated prompts no later history of their line has joined."""
    return {key for line in store.children("histories") for key in _unjoined(store, line, at)}


def _unjoined(store: Store, line: str, at: datetime) -> set[str]:
    folder = f"histories/{line}/datasets"
    joined, datasets = set[str](), set[str]()
    for name in sorted(store.children(folder), reverse=True):
        match = _RECORD.fullmatch(name)
        if match is None or match[2] in joined:
            continue
        datasets.add(match[2])
        # Another plan that is made just now may still read what the newest record has joined.
        if time_of(match[1]) > at - timedelta(days=1):
            continue
        with contextlib.suppress(IntegrityError, ValueError, NotFound):
            path = f"{folder}/{name}"
            joined.update(signatures.parse(store, path, store.read(path).data, DatasetRecord, keys.PLANNER).joined)
    return datasets - joined
