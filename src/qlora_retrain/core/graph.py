"""The pipeline as plain data: six steps, what each reads and the one artifact it makes.

Standard library only: Airflow, KFP, the plan and the documentation are each one short loop over `STEPS`.
Command: `qlora-retrain graph [--format mermaid]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Image = Literal["light", "train"]

# What a tokenizer needs; `validate_data` fetches only these, so new weights under the same tokenizer keep its dataset.
TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
)


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
        only: Glob patterns; where given, only the files that match are fetched and enter the key.
    """

    name: str
    only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """A program that reads artifacts and makes exactly one.

    Attributes:
        name: Also the folder below `components/`.
        section: The part of a line's YAML that configures it.
        reads: In the order of `run`'s parameters.
        makes: The artifact.
        image: `light` has no torch, `train` has the training stack.
        gpus: GPUs wanted on a GPU runtime; training takes one for each of its processes.
        retries: Tries after the first, used for exit codes that say "try again".
        scratch: The step gets a folder that the runner restores, mirrors to the store and removes after success.
        store: The step gets its inputs' manifests, the plan and the store instead of fetched folders.
        report: The page for a person among the artifact's files, if it has one.
    """

    name: str
    section: str
    reads: tuple[Input, ...]
    makes: str
    image: Image
    summary: str
    gpus: int = 0
    retries: int = 2
    scratch: bool = False
    store: bool = False
    report: str | None = "report.html"


SOURCES = (
    Source("raw_data", optional=False, meaning="the line's examples, as files"),
    Source("base_model", optional=False, meaning="the original 16-bit model, safetensors"),
    Source(
        "champion", optional=True, meaning="the version that `production` names: its 16-bit model, its data profile"
    ),
    Source("anchor", optional=True, meaning="the line's best version so far, its 16-bit model, where that is another"),
    Source("reference_profile", optional=True, meaning="the data profile of the version that `data.reference` names"),
    Source("golden_data", optional=True, meaning="hand-kept examples that are never trained on"),
    Source("reference_data", optional=True, meaning="general text that shows what was forgotten"),
)

STEPS = (
    Step(
        "validate_data",
        section="data",
        reads=(
            Input("raw_data"),
            Input("base_model", only=TOKENIZER_FILES),
            Input("golden_data"),
            Input("reference_profile"),
        ),
        makes="dataset",
        image="light",
        summary="Read, check, quarantine, de-duplicate and split the examples.",
    ),
    Step(
        "quantize_model",
        section="quantize",
        reads=(Input("base_model"),),
        makes="base_nf4",
        image="train",
        report=None,
        summary="Store the base model in NF4 with double quantization.",
    ),
    Step(
        "train_qlora",
        section="train",
        reads=(Input("dataset"), Input("base_nf4")),
        makes="adapter",
        image="train",
        gpus=1,
        retries=5,
        scratch=True,
        summary="Train a LoRA adapter over the frozen 4-bit base.",
    ),
    Step(
        "evaluate",
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
        section="merge",
        reads=(
            Input("dataset"),
            Input("base_model"),
            Input("base_nf4"),
            Input("adapter"),
            Input("evaluation"),
            Input("reference_data"),
        ),
        makes="model",
        image="train",
        summary="Merge the adapter into a 16-bit model and judge that form by the same rules.",
    ),
    Step(
        "publish",
        section="publish",
        reads=(Input("dataset"), Input("adapter"), Input("evaluation"), Input("model")),
        makes="release",
        image="light",
        store=True,
        report=None,
        summary="Publish an immutable version and move its aliases.",
    ),
)

# Sources that are published versions of the line, and which of a version's folders and files a step gets.
PROFILE = "data/profile.json"
VERSIONS = {"champion": ("model", PROFILE), "anchor": ("model",), "reference_profile": (PROFILE,)}

PLAN_TASK = "plan"  # task 0 of every orchestrator; not a step


@cache
def step(name: str) -> Step:
    """The step of that name; raises `KeyError` for an unknown one."""
    return {s.name: s for s in STEPS}[name]


def maker(artifact: str) -> Step | None:
    """The step that makes `artifact`, or None where it is a source."""
    return next((s for s in STEPS if s.makes == artifact), None)


def after(item: Step) -> tuple[str, ...]:
    """The names of the steps that `item` runs after, in graph order."""
    makers = {found.name for i in item.reads if (found := maker(i.name))}
    return tuple(s.name for s in STEPS if s.name in makers)


def edges() -> tuple[tuple[str, str], ...]:
    """Every (upstream, downstream) pair of steps."""
    return tuple((up, s.name) for s in STEPS for up in after(s))


def as_text() -> str:
    """The graph as a table for a terminal."""
    rows = [("step", "reads", "makes", "image", "gpu", "after")]
    for s in STEPS:
        reads = ", ".join(i.name + (" (tokenizer)" if i.only else "") for i in s.reads)
        rows.append((s.name, reads, s.makes, s.image, str(s.gpus), ", ".join(after(s)) or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def as_mermaid() -> str:
    """The graph as a Mermaid flowchart, sources as rounded boxes."""
    lines = ["flowchart LR"]
    lines += [f"  {s.name}([{s.name}])" for s in SOURCES]
    for s in STEPS:
        lines.append(f"  {s.name}[{s.name}]")
        for item in s.reads:
            made_by = maker(item.name)
            origin = f"{made_by.name} -- {item.name} -->" if made_by else f"{item.name} -->"
            lines.append(f"  {origin} {s.name}")
    return "\n".join(lines)
