"""The pipeline as plain data: six steps, the inputs that each reads and the one artifact that it makes.

Standard library only. Airflow, KFP, the plan and the documentation are each one short loop over `STEPS`.
Command: `qlora-retrain graph [--format mermaid]`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cache
from typing import Literal

Image = Literal["light", "train"]

# Which files of an input a step reads; `pipeline/plan.py` has the glob patterns of each set.
FileSet = Literal["all", "tokenizer"]


@dataclass(frozen=True, slots=True)
class Source:
    """An input that no step makes."""

    name: str
    optional: bool
    meaning: str


@dataclass(frozen=True, slots=True)
class Input:
    """One thing a step reads: a source or another step's artifact.

    Attributes:
        name: The source's or artifact's name; also the parameter's name in the step's `run`.
        files: Only the files of this set are fetched and enter the key.
        only_with: A source; without it this one is not read, whether the line has it or not.
    """

    name: str
    files: FileSet = "all"
    only_with: str | None = None


class StepKind(enum.StrEnum):
    """What a step does with the store."""

    COMPUTE = "compute"  # reads folders that are fetched for it, writes one that is uploaded after it
    PUBLISH = "publish"  # gets its inputs' manifests, the plan and the store itself


@dataclass(frozen=True, slots=True)
class Step:
    """A program that reads artifacts and makes exactly one.

    Attributes:
        name: Also the folder below `components/`.
        title: The name in words, for the UIs of orchestrators.
        section: The part of a line's YAML that configures it.
        reads: The inputs, in the order of `run`'s parameters.
        makes: The artifact's name.
        image: `light` has no torch, `train` has the training stack.
        summary: One sentence for command-line help and for the UIs of orchestrators.
        gpus: GPUs that the step asks for on a GPU runtime; training takes one for each of its processes.
        retries: Attempts after the first, used for exit codes that say "try again".
        scratch: The step has a folder for checkpoints: restored before it, uploaded meanwhile, deleted after success.
        kind: What it does with the store.
        report: The HTML file for a person among the artifact's files; None where it has none.
    """

    name: str
    title: str
    section: str
    reads: tuple[Input, ...]
    makes: str
    image: Image
    summary: str
    gpus: int = 0
    retries: int = 2
    scratch: bool = False
    kind: StepKind = StepKind.COMPUTE
    report: str | None = "report.html"


SOURCES = (
    Source("raw_data", optional=False, meaning="the line's examples, as files"),
    Source("base_model", optional=False, meaning="the original 16-bit model, safetensors"),
    Source(
        "champion",
        optional=True,
        meaning="the version that `production` names: its 16-bit model or its adapter alone, its data profile",
    ),
    Source("anchor", optional=True, meaning="the line's best version so far, if not the champion: its 16-bit model"),
    Source(
        "reference_profile",
        optional=True,
        meaning="the data profile of the version that `data.reference_version` names",
    ),
    Source("golden_data", optional=True, meaning="examples kept by hand, which are never trained on"),
    Source("replay_data", optional=True, meaning="general examples that are trained on beside the line's own"),
    Source("eval_data", optional=True, meaning="evaluation examples, instead of a part of raw_data"),
    Source("reference_data", optional=True, meaning="general text, to measure what the model forgot"),
    Source(
        "evaluation_history",
        optional=True,
        meaning="digests of the prompts that the line has evaluated, which are never trained on",
    ),
    Source(
        "champion_adapter",
        optional=True,
        meaning="the adapter of the version in production, where training starts from it, and its data profile",
    ),
    Source(
        "earlier_adapters",
        optional=True,
        meaning="the adapters of the line's last accepted versions, where merge.soup averages this run's with them",
    ),
)

# In an order in which they can run: every step comes after the steps whose artifacts it reads.
STEPS = (
    Step(
        "validate_data",
        title="Check and split the data",
        section="data",
        reads=(
            Input("raw_data"),
            # Only the tokenizer: new weights under the same tokenizer keep the dataset.
            Input("base_model", files="tokenizer"),
            Input("golden_data"),
            Input("reference_profile"),
            Input("eval_data"),
            Input("evaluation_history"),
            Input("replay_data"),
            # Replay rows that are reference text would hide what the model forgets.
            Input("reference_data", only_with="replay_data"),
        ),
        makes="dataset",
        image="light",
        summary="Read, check, quarantine, de-duplicate and split the examples.",
    ),
    Step(
        "quantize_model",
        title="Store the base model",
        section="quantize",
        reads=(Input("base_model"),),
        makes="base_nf4",
        image="train",
        report=None,
        summary="Store the base model in the line's format: 4 bits or 16.",
    ),
    Step(
        "train_qlora",
        title="Train the adapter",
        section="train",
        reads=(Input("dataset"), Input("base_nf4"), Input("champion_adapter")),
        makes="adapter",
        image="train",
        gpus=1,
        # More than the others: the longest step is the one that is preempted, and each attempt resumes.
        retries=5,
        scratch=True,
        summary="Train a LoRA adapter over the frozen base.",
    ),
    Step(
        "evaluate",
        title="Evaluate against production",
        section="evaluate",
        reads=(
            Input("dataset"),
            Input("base_model"),
            Input("base_nf4"),
            Input("adapter"),
            Input("champion"),
            Input("anchor"),
            Input("golden_data"),
            Input("reference_data"),
        ),
        makes="evaluation",
        image="train",
        gpus=1,
        summary="Score base, challenger, champion and anchor on the same rows; pass or refuse.",
    ),
    Step(
        "merge_adapter",
        title="Merge and certify",
        section="merge",
        reads=(
            Input("dataset"),
            Input("base_model"),
            Input("base_nf4"),
            Input("adapter"),
            Input("evaluation"),
            Input("reference_data"),
            Input("earlier_adapters"),
        ),
        makes="model",
        image="train",
        summary="Merge the adapter into a 16-bit model and judge that form by the same rules.",
    ),
    Step(
        "publish",
        title="Publish the version",
        section="publish",
        reads=(Input("dataset"), Input("adapter"), Input("evaluation"), Input("model")),
        makes="release",
        # Light: it copies inside the store and loads no model.
        image="light",
        kind=StepKind.PUBLISH,
        report=None,
        summary="Publish an immutable version and move its aliases.",
    ),
)

# Sources that are published versions of the line, and the folders and files of a version that a step gets. The others
# (reports; the adapter, where a version has a model of its own) are not fetched.
PROFILE_PATH = "data/profile.json"
ADAPTER_PART = "adapter"
START = "champion_adapter"
VERSION_PARTS = {
    "champion": ("model", ADAPTER_PART, PROFILE_PATH),
    "anchor": ("model", ADAPTER_PART),
    "reference_profile": (PROFILE_PATH,),
    START: (ADAPTER_PART, PROFILE_PATH),
}
# Is there where a version is an adapter alone: which base it needs.
BASE_REFERENCE = "model/base.json"

# The source that consists of adapters of several versions, each in a folder that is named by its version.
EARLIER_ADAPTERS = "earlier_adapters"

# The source that the planner joins from the data sets of a line, and the one file of it: a data set has its own part
# under the same name.
HISTORY = "evaluation_history"
EVALUATED_PROMPTS = "evaluated_prompts.txt"

# Task 0 of every orchestrator. It is not a step: it makes no artifact, and every step needs its result.
PLAN_TASK = "plan"
PLAN_TITLE = "Plan the run"


@cache
def step(name: str) -> Step:
    """Return the step of that name; raise `KeyError` for an unknown one."""
    return {s.name: s for s in STEPS}[name]


def producer(artifact: str) -> Step | None:
    """Return the step that makes `artifact`, or None where it is a source."""
    return next((s for s in STEPS if s.makes == artifact), None)


def producer_name(artifact: str) -> str:
    """Return the name of the step that makes `artifact`; raise `KeyError` for a source or an unknown name."""
    return {s.makes: s.name for s in STEPS}[artifact]


def descendants(artifact: str) -> tuple[str, ...]:
    """Return the names of the steps that read `artifact` or something that was made from it, in graph order."""
    # One loop is enough, because every step comes after the steps whose artifacts it reads.
    names, artifacts = [], {artifact}
    for s in STEPS:
        if artifacts & {i.name for i in s.reads}:
            names.append(s.name)
            artifacts.add(s.makes)
    return tuple(names)


def upstream_steps(item: Step) -> tuple[str, ...]:
    """Return the names of the steps that `item` runs after, in graph order."""
    makers = {maker.name for i in item.reads if (maker := producer(i.name))}
    return tuple(s.name for s in STEPS if s.name in makers)


def steps_until(name: str | None) -> tuple[Step, ...]:
    """Return the step of that name and every step that it needs, in graph order; None: all steps."""
    if name is None:
        return STEPS
    names = {name}
    for item in reversed(STEPS):
        if item.name in names:
            names.update(upstream_steps(item))
    return tuple(item for item in STEPS if item.name in names)


def edges() -> tuple[tuple[str, str], ...]:
    """Return every (upstream, downstream) pair of steps."""
    return tuple((up, s.name) for s in STEPS for up in upstream_steps(s))
