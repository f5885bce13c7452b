"""The plan: the lock file of a run. It has every step's config, input keys and output key before any step runs.

`make_plan` writes `runs/<run_id>/plan.json`; every task of a run reads it.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field, ValidationError

from qlora_retrain.core import graph, hashing, uris
from qlora_retrain.core.aliases import alias_of_run
from qlora_retrain.core.arguments import ANY_ALIAS
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.pipeline import planned_steps
from qlora_retrain.pipeline.auto_settings import Choice
from qlora_retrain.pipeline.new_rows import MinNewRows
from qlora_retrain.pipeline.planned_steps import PinnedAdapter, PinnedHistory, PinnedVersion, PlannedStep
from qlora_retrain.storage import keys, open_store, signatures
from qlora_retrain.storage.signatures import Signed
from qlora_retrain.storage.sources import PinnedSource
from qlora_retrain.storage.store import NotFound

# Between a plan's place and the hash of its bytes.
_HASH_MARK = "#sha256="


class Plan(Signed):
    """A run's lock file; the attributes are the fields of `plan.json`.

    Attributes:
        champion: The version that `production` named when the plan was made.
        anchor: The line's best version so far; None where that is the champion, or there is none.
        reference: The version that `data.reference_version` names.
        start: The version from whose adapter training starts; None: a new adapter.
        earlier_adapters: The versions whose adapters are averaged with this run's, the newest first.
        history: The line's evaluation history; None where nothing was evaluated before.
        target: The version that the alias named then that the run moves. It moves only if it still does.
        judgement: The hash of the settings, code and data by which a challenger is judged, without the champion.
        unchanged: The version in production, if the same recipe made it; then no step runs. None otherwise.
        sequence: One more than the generation of `latest` when the plan was made: it orders the line's versions.
        min_new_rows: How many new rows the run needs; None: any number will do.
        choices: The value of each setting that was `auto`, with the reason.
    """

    schema_version: Literal[1] = 1
    run_id: str
    created_at: str
    root: str
    line: str
    sources: dict[str, PinnedSource | None]
    champion: PinnedVersion | None
    anchor: PinnedVersion | None = None
    reference: PinnedVersion | None = None
    # Left out where there is none, as in the plans of earlier releases, whose bytes are hashed.
    history: PinnedHistory | None = Field(default=None, exclude_if=lambda value: value is None)
    start: PinnedAdapter | None = Field(default=None, exclude_if=lambda value: value is None)
    earlier_adapters: tuple[PinnedAdapter, ...] = Field(default=(), exclude_if=lambda value: not value)
    target: str | None
    judgement: str
    unchanged: str | None
    sequence: int | None = Field(default=None, exclude_if=lambda value: value is None)
    min_new_rows: MinNewRows | None = Field(default=None, exclude_if=lambda value: value is None)
    choices: tuple[Choice, ...]
    steps: tuple[PlannedStep, ...]

    @property
    def uri(self) -> str:
        """The URI of this plan with the hash of its bytes, so that no step runs by a plan that was changed since."""
        return f"{plan_uri(self.root, self.run_id)}{_HASH_MARK}{hashing.sha256_bytes(self.to_bytes())}"

    def to_bytes(self) -> bytes:
        """Return the bytes of `plan.json`."""
        return self.model_dump_json(indent=1).encode()

    def pinned_version(self, source: str) -> PinnedVersion | None:
        """Return the version that the plan pins for a source of `graph.VERSION_PARTS`."""
        return {
            "champion": self.champion,
            "anchor": self.anchor,
            "reference_profile": self.reference,
            graph.START: self.start,
        }[source]

    @property
    def stamp(self) -> str:
        """The plan's UTC time, as versions begin: 20260131T235959Z."""
        return self.created_at

    @property
    def moved_alias(self) -> str | None:
        """The alias that the run moves beside `latest`; None: no other."""
        config = self.step(graph.producer_name("release")).config
        return alias_of_run(config.get("promote_to"), has_approval=config.get("approval", False))

    def step(self, name: str) -> PlannedStep:
        """Return the planned step of that name."""
        return next(s for s in self.steps if s.name == name)

    def choice_reasons(self, section: str) -> dict[str, str]:
        """Return the reason of each automatic choice in a section, by field."""
        prefix = f"{section}."
        return {c.field.removeprefix(prefix): c.reason for c in self.choices if c.field.startswith(prefix)}

    @staticmethod
    def load(uri: str) -> Plan:
        """Read a plan that steps may run by, from the URI that its maker gave.

        Raises:
            UsageError: If there is none at `uri`, or `uri` is without the plan's hash.
            IntegrityError: If it is not a plan, has another hash, is a copy of another plan, contradicts itself, or was
                not signed by the planner of a store with keys.
        """
        if not _split_hash(uri)[1]:
            raise UsageError(
                f"{uris.mask_secrets(uri)}: expected the plan's URI with its hash, .../plan.json{_HASH_MARK}..., as "
                "qlora-retrain plan prints it: without it, nobody notices that a plan was changed"
            )
        plan, data = _read(uri)
        plan.refuse_untrusted(data)
        return plan

    @staticmethod
    def of_run(root: str, run_id: str) -> Plan:
        """Read the plan of a run of this store, as `load` does; without its hash, its signature is the only proof."""
        plan, data = _read(plan_uri(root, run_id))
        plan.refuse_untrusted(data)
        return plan

    @staticmethod
    def read(uri: str) -> Plan:
        """Read a plan in order to show it; one that an older version of this code made is shown too.

        Raises:
            UsageError: If there is none at `uri`.
            IntegrityError: If it is not a plan, has another hash than the URI's, is a copy of another plan, or was not
                signed by the planner of a store with keys.
        """
        plan, data = _read(uri)
        signatures.parse(open_store(plan.root), plan_path(plan.run_id), data, Plan, keys.PLANNER)
        return plan

    def refuse_other(self, *, line: str | None = None, root: str | None = None, alias: str | None = ANY_ALIAS) -> None:
        """Refuse a plan of another line or store, or one that moves another alias, than the orchestrator says.

        Args:
            line: The line; None: any.
            root: The store's URI; None: any.
            alias: The one alias that may move; None: no alias; `*`: any.

        Raises:
            IntegrityError: For such a plan.
        """
        if line not in (None, self.line):
            raise IntegrityError(f"run {self.run_id}: expected a plan of line {line}, found one of {self.line}")
        if root is not None and uris.absolute(root) != self.root:
            raise IntegrityError(f"run {self.run_id}: expected a plan in {root}, found one in {self.root}")
        moved = self.moved_alias
        if alias != ANY_ALIAS and moved not in (None, alias):
            raise IntegrityError(
                f"run {self.run_id}: moves the alias {moved}, and {alias or 'no alias'} may be moved; if the line has "
                "changed since the plan was made, start a new run"
            )

    def refuse_untrusted(self, data: bytes) -> None:
        """Check the planner's signature; compute every step again from its settings and sources, and compare.

        Otherwise a plan could record one learning rate and train with another, or name any artifact as an input.

        Args:
            data: The bytes from which the plan was read.

        Raises:
            IntegrityError: If somebody else wrote it, or a step differs from what its settings and sources make of it.
            UsageError: If it is signed, and this process has no keys to check that and to sign what it makes.
        """
        store, path = open_store(self.root), plan_path(self.run_id)
        signatures.refuse_unverified(store, path, self.signature)
        signatures.parse(store, path, data, Plan, keys.PLANNER)

        versions = {name: self.pinned_version(name) for name in graph.VERSION_PARTS}
        fault = planned_steps.find_contradiction(
            self.steps, self.sources, versions, self.history, self.line, self.target, self.earlier_adapters
        )
        if fault is not None:
            raise IntegrityError(
                f"{uris.mask_secrets(self.uri)}: {fault}: the plan was changed since it was made, or another version "
                "of this code made it; make a new plan"
            )


def _read(uri: str) -> tuple[Plan, bytes]:
    """Return a plan and its bytes; the errors are those of `Plan.read`."""
    location, sha256 = _split_hash(uri)
    parent, _, name = uris.absolute(location).rpartition("/")
    place = uris.mask_secrets(location)
    try:
        data = open_store(parent).read(name).data
    except NotFound as error:
        raise UsageError(f"{place}: there is no plan here; make one with: qlora-retrain plan") from error

    actual = hashing.sha256_bytes(data)
    if sha256 not in ("", actual):
        difference = f"expected a plan of sha256 {sha256[:12]}, found {actual[:12]}"
        raise IntegrityError(f"{place}: {difference}: it was changed since it was made; make a new plan")
    try:
        # Parsed as `signatures.parse` does it, so that what is checked is what is used.
        plan = Plan.model_validate(signatures.parse_fields(data))
    except ValueError as error:
        fault = f"{error.error_count()} errors" if isinstance(error, ValidationError) else str(error)
        raise IntegrityError(f"{place}: is not a plan: {fault}") from error
    # A copied plan would have its steps write into another run's folder.
    if plan_uri(plan.root, plan.run_id) != f"{parent}/{name}":
        raise IntegrityError(f"{place}: is a copy of {plan_uri(plan.root, plan.run_id)}; use the original")
    return plan, data


def _split_hash(uri: str) -> tuple[str, str]:
    """Return a plan's place and the hash in its URI; no hash: an empty text."""
    match = re.fullmatch(rf"(.*){_HASH_MARK}([0-9a-f]{{64}})", uri, re.DOTALL)
    return (match[1], match[2]) if match else (uri, "")


def run_id(at: datetime, *ids: str) -> str:
    """Return the run's id in the store: its UTC time stamp and 12 hex digits of the hash of the orchestrator's ids."""
    # Hashed, because an orchestrator's ids may hold characters that a path or a Kubernetes name does not allow.
    return f"{utc_stamp(at)}-{hashlib.sha256(hashing.canonical_json(list(ids))).hexdigest()[:12]}"


def utc_stamp(at: datetime) -> str:
    """Format a time as runs and versions begin: 20260131T235959Z."""
    return at.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")


def plan_path(run_id: str) -> str:
    """Return the path of a run's plan in its store."""
    return f"runs/{run_id}/plan.json"


def plan_uri(root: str, run_id: str) -> str:
    """Return the URI of a run's plan."""
    return f"{root.rstrip('/')}/{plan_path(run_id)}"
