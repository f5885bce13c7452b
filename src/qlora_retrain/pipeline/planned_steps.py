"""The steps of a plan: each with its settings, the keys of its inputs, its code and its own key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_retrain.config.fields import Section
from qlora_retrain.config.line import section_model
from qlora_retrain.core import graph, hashing
from qlora_retrain.lm.tokenizer_files import TOKENIZER_FILES
from qlora_retrain.pipeline import code_identity
from qlora_retrain.storage.sources import PinnedSource

# The glob patterns of each set of files that a step can read of a source; no patterns: every file.
FILE_SETS: dict[graph.FileSet, tuple[str, ...]] = {"all": (), "tokenizer": TOKENIZER_FILES}


class PinnedVersion(BaseModel):
    """A published version that the plan pins: the champion, the anchor, or what `data.reference_version` names."""

    model_config = ConfigDict(frozen=True)
    version: str
    manifest_sha256: str
    content_hash: str

    @property
    def input_key(self) -> str:
        """What enters the key of a step that reads it: its manifest's hash covers its model and its data profile."""
        return self.manifest_sha256


class PinnedAdapter(PinnedVersion):
    """A published version of which a step reads the adapter.

    Attributes:
        adapter_hash: The hash of the files that the step reads. Another version with the same adapter has it too.
    """

    adapter_hash: str

    @property
    def input_key(self) -> str:
        """What enters the key of a step that reads it."""
        return self.adapter_hash


class PinnedHistory(BaseModel):
    """What the plan pins of the line's evaluation history.

    Attributes:
        sha256: The hash of the document's bytes.
        size_bytes: Their number.
        chats: How many different chats it remembers, by canonical text.
    """

    model_config = ConfigDict(frozen=True)
    sha256: str
    size_bytes: int
    chats: int


class PlannedStep(BaseModel):
    """One step with everything that determines its artifact."""

    model_config = ConfigDict(frozen=True)
    name: str
    config: dict[str, Any]
    identity: dict[str, Any]
    inputs: dict[str, str | None]
    code: str
    key: str


def plan_steps(
    settings: Mapping[str, Section],
    pinned: Mapping[str, PinnedSource | None],
    versions: Mapping[str, PinnedVersion | None],
    history: PinnedHistory | None,
    line: str,
    target: str | None,
    code_of: Callable[[str], str] = code_identity.code_hash,
    earlier: Sequence[PinnedAdapter] = (),
) -> tuple[PlannedStep, ...]:
    """Compute every step's key from its settings, its inputs' keys and its code.

    Args:
        settings: The sections of the line, by name.
        pinned: The sources, by name.
        versions: The published versions that steps read, by the name of the input.
        history: The prompts that were evaluated before; None: there are none.
        line: The line, which enters the key of the step that publishes its versions.
        target: The version and the generation that the alias of `publish` names; None: nothing.
        code_of: Returns the hash of a step's code.
        earlier: The versions whose adapters are averaged with this run's.
    """
    # The graph's order is topological, so the keys of a step's inputs are known before its own is computed.
    artifact_keys: dict[str, str] = {}
    planned = []
    for step in graph.STEPS:
        inputs: dict[str, str | None] = {}
        for item in step.reads:
            source = pinned.get(item.name)
            if item.name in versions:
                version = versions[item.name]
                inputs[item.name] = version.input_key if version else None
            elif item.name == graph.EARLIER_ADAPTERS:
                adapters = [[adapter.version, adapter.adapter_hash] for adapter in earlier]
                inputs[item.name] = hashing.sha256_json(adapters) if adapters else None
            elif item.name == graph.HISTORY:
                inputs[item.name] = history.sha256 if history else None
            elif item.only_with is not None and pinned.get(item.only_with) is None:
                inputs[item.name] = None
            elif item.name in artifact_keys:
                inputs[item.name] = artifact_keys[item.name]
            else:
                inputs[item.name] = source.subset(FILE_SETS[item.files]).key() if source else None

        # The step moves an alias of a line. Once the alias names another version, and for another line, the same work
        # has to be done again.
        if step.kind == graph.StepKind.PUBLISH:
            inputs |= {"line": line, "target": target}

        section = settings[step.section]
        identity = section.identity()
        code_hash = code_of(step.name)
        # Operational settings are left out, so that a changed log interval does not retrain a model.
        key = hashing.step_key(step.name, identity, inputs, code_hash)
        artifact_keys[step.makes] = key
        planned.append(
            PlannedStep(
                name=step.name,
                config=section.model_dump(mode="json"),
                identity=identity,
                inputs=inputs,
                code=code_hash,
                key=key,
            )
        )
    return tuple(planned)


def judgement_hash(steps: Sequence[PlannedStep]) -> str:
    """Hash the settings, code and data that decide about a challenger, without the adapter and the champion."""
    judging_steps = {}
    for step in steps:
        if step.name in graph.descendants("adapter"):
            # The adapter's and the champion's keys are left out: they change with every run.
            data_keys = {n: k for n, k in step.inputs.items() if n in ("golden_data", "reference_data")}
            judging_steps[step.name] = {"config": step.identity, "code": step.code, "inputs": data_keys}
    return hashing.sha256_json(judging_steps)


def describe_target(version: str, generation: int) -> str:
    """Return how the state of an alias enters the key of the step that moves it."""
    return f"{version} of generation {generation}"


def find_contradiction(
    steps: Sequence[PlannedStep],
    pinned: Mapping[str, PinnedSource | None],
    versions: Mapping[str, PinnedVersion | None],
    history: PinnedHistory | None,
    line: str,
    target: str | None,
    earlier: Sequence[PinnedAdapter] = (),
) -> str | None:
    """Compute the steps again from their settings, and return the first difference; None where there is none."""
    names = [step.name for step in graph.STEPS]
    if [step.name for step in steps] != names:
        return f"its steps are {', '.join(step.name for step in steps)}, expected {', '.join(names)}"

    by_name = {step.name: step for step in steps}
    settings: dict[str, Section] = {}
    for step in graph.STEPS:
        try:
            settings[step.section] = section_model(step.section).model_validate(by_name[step.name].config)
        except ValidationError as error:
            return f"{step.name}.config: {error.errors()[0]['msg']}"

    alias_state = by_name[graph.STEPS[-1].name].inputs.get("target")
    if (alias_state or "").partition(" of generation ")[0] != (target or ""):
        return f"it moves an alias from {alias_state}, and its target is {target}"
    expected = plan_steps(
        settings, pinned, versions, history, line, alias_state, lambda name: by_name[name].code, earlier
    )
    for planned, again in zip(steps, expected, strict=True):
        for field in PlannedStep.model_fields:
            if getattr(planned, field) != getattr(again, field):
                return f"{planned.name}.{field} does not follow from its settings and sources"
    return None
