"""What an attacker can do with a store, and what the pipeline answers.

`Store` is a real store with keys after one whole run of a line, and with a second run that waits before a step. An
attack writes into the store what a writer of one prefix can write, and returns what the next reader said.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core import graph, hashing
from qlora_retrain.core.errors import Problem
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, keys, open_store, pull, registry, signatures
from qlora_retrain.storage.artifact import Manifest

LINE = "intents"
RUN = "20260201T000000Z-0123456789ab"


@dataclass
class Attacker:
    """A line's store under attack.

    Attributes:
        line: The line's YAML.
        root: The store's URI.
        steps: A quick `run` for every step.
        folder: The store's folder, in which an attacker writes.
        scratch: A folder beside it.
        first: The plan of the run that is over.
        cache: The node's cache.
        environment: Sets variables until the test ends.
    """

    line: Path
    root: str
    steps: Mapping[str, Callable[..., StepResult]]
    scratch: Path
    first: Plan
    cache: Path
    environment: pytest.MonkeyPatch

    @property
    def folder(self) -> Path:
        return Path(self.root.removeprefix("file://"))

    def plan(self, run: str | None = None, **data: str) -> Plan:
        """Make a plan; with `text`, of other data."""
        if "text" in data:
            rows = self.line.parent / "tickets.jsonl"
            rows.write_text(rows.read_text() + data["text"] + "\n")
        return make_plan.make_plan(self.line, self.root, run=run)

    def run_until(self, plan: Plan, last: str) -> None:
        """Run every step before `last`."""
        for name in list(self.steps)[: list(self.steps).index(last)]:
            assert execute.run_step(plan, name, lambda name=name: self.steps[name]).code == 0  # type: ignore[misc]

    def run(self, uri: str, step: str) -> str:
        """Run a step as its pod does, from the plan's URI; return what it said."""

        def work() -> str:
            ending = execute.run_step(Plan.load(uri), step, lambda: self.steps[step])
            return answer(f"`{step}`", ending.code, ending.reason)

        return outcome(f"`{step}`", work)

    def allow_sources(self, folder: Path) -> None:
        """Let the platform allow sources below a folder alone."""
        file = self.scratch / "platform.yaml"
        file.write_text(f"sources: [{folder.as_uri()}/]\n")
        self.environment.setenv("QLORA_RETRAIN_PLATFORM", str(file))

    def document(self, path: str) -> Any:
        return json.loads((self.folder / path).read_text())

    def write(self, path: str, document: Any) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(json.dumps(document))

    def manifest_path(self, plan: Plan, step: str) -> str:
        return artifact.manifest_path(graph.step(step).makes, plan.step(step).key)

    def sign(self, path: str, document: dict[str, Any], private_key: Path, claimed_role: str) -> dict[str, Any]:
        """Sign a document with a private key that is not the role's, under the role's name."""
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = serialization.load_pem_private_key(private_key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        fields = {name: value for name, value in document.items() if name != "signature"}
        value = key.sign(signatures._signed_text(path, fields), ec.ECDSA(hashes.SHA256()))
        public = keys.encode_public_key(key.public_key())
        signature = {"role": claimed_role, "key": public, "value": base64.b64encode(value).decode()}
        return {**fields, "signature": signature}

    def own_key(self) -> Path:
        """Return the file of a key that the attacker made."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self.scratch / "attacker.pem"
        path.write_bytes(pem)
        return path

    def stolen_key(self, role: str) -> Path:
        return keys.keys_folder(self.root) / f"{role}.pem"

    def pull(self, destination: str = "pulled", **options: Any) -> str:
        def work() -> str:
            release = pull.pull(open_store(self.root), f"{LINE}@production", self.scratch / destination, **options)
            return f"`pull` gives {release.version.partition('-')[0] and 'the version that the alias names'}"

        return outcome("`pull`", work)

    def alias(self, name: str = "production") -> registry.Alias:
        state, _ = registry.read_alias(open_store(self.root), LINE, name)
        assert state is not None
        return state


def outcome(who: str, work: Callable[[], str]) -> str:
    """Return what a program said: its answer, or its exit code and reason."""
    try:
        return work()
    except Problem as problem:
        return answer(who, problem.exit_code, str(problem))


def answer(who: str, code: int, reason: str | None) -> str:
    """Return a program's end as a cell of the table, without what differs from run to run."""
    if code == 0:
        return f"{who} ends with 0"
    # The place comes first in every message; who reads the table wants the fault, without what to do about it.
    text = re.sub(r"^(file|s3)://[^ ]*: ", "", reason or "")
    text = re.sub(r"(file:/)?/[^ ]*/(store|pulled|line/)\b", lambda match: match[2].removesuffix("line/"), text)
    text = re.split(r": somebody|: to make|: it was changed|: the plan was|[;]|: no alias|, pulled before", text)[0]
    text = re.sub(r" \([0-9a-f]{12}(, [0-9a-f]{12})*\)", "", text)
    text = re.sub(r"\d{8}T\d{6}Z-\w+|[0-9a-f]{12,}", "…", text)
    return f"{who} ends with {int(code)}: {text}"


def forge_done(manifest: Manifest) -> dict[str, Any]:
    """Return a refusal's manifest as that of a success."""
    fields = json.loads(manifest.model_dump_json())
    return {**fields, "outcome": "done", "exit_code": 0, "reason": None}


def sha256(path: Path) -> str:
    return hashing.sha256_file(path)
