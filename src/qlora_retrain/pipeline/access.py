"""Who may do what with a store, role by role: the table behind policies, mounts and their tests.

Everything follows from the graph, so a new step has its rights by itself. Patterns are paths below the store's root, as
IAM reads them: `*` matches any characters, also `/`, and `${*}` the character itself.

What patterns cannot separate: the attempts of one step (their names are random), the lines in `artifacts/`, `scratch/`
and `runs/` (keys and run ids name none), and the runs of one line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from qlora_retrain.config.line import LineConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline.planned_steps import FILE_SETS
from qlora_retrain.storage.collection_mark import MARK_PATH
from qlora_retrain.storage.keys import MESSAGE, MIRROR, PLANNER, step_role

# Removes artifacts (`drop`), and what nobody needs any more (`gc`).
GC = "gc"
# A consumer of the line's versions.
PULL = "pull"

_PLANS = "runs/*/plan.json"


@dataclass(frozen=True, slots=True)
class Access:
    """What a role may do.

    Attributes:
        reads: Files of the store that it may read, and whose names it may list.
        lists: Further files whose names it may list.
        writes: Files that it may write.
        deletes: Files that it may delete.
        retains: Files whose retention it may set.
        sources: URIs of the files outside of the store that it may read, as patterns.
        aborts: Whether it may list and abort the uploads that were never finished.
        pins_sources: Whether it also reads old versions of a source, by which the plan remembers hashes.
        signs: Whether it has a key to sign with.
    """

    reads: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()
    retains: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    aborts: bool = False
    pins_sources: bool = False
    signs: bool = True


def roles(line: str) -> tuple[str, ...]:
    """Return every role of a line."""
    return (PLANNER, *(step_role(step, line) for step in graph.STEPS), GC, PULL, MIRROR, MESSAGE)


def access(config: LineConfig, role: str) -> Access:
    """Return what a role may do for a line.

    Raises:
        UsageError: If there is no such role.
    """
    if role == PLANNER:
        return _planner_access(config)
    if role == GC:
        return _gc_access(config)
    if role in (PULL, MIRROR):
        return Access(reads=(f"models/{config.line}/*",), signs=False)
    if role == MESSAGE:
        endings, manifests = "runs/*/endings/*.json", "artifacts/*/_manifest.json"
        return Access(reads=(_PLANS, endings, manifests, f"models/{config.line}/aliases/*"), signs=False)

    step = next((step for step in graph.STEPS if step_role(step, config.line) == role), None)
    if step is None:
        raise UsageError(f"{role}: no role of line {config.line}; expected one of {', '.join(roles(config.line))}")
    return _step_access(config, step)


def write_folders(step: graph.Step, line: str, run_id: str) -> list[str]:
    """Return the folders of a store in which a step of a run writes, for platforms that know folders alone."""
    # The folder above the first name that the pattern leaves open.
    patterns = (pattern.replace("runs/*/", f"runs/{run_id}/") for pattern in _writes(step, line))
    return sorted({pattern.partition("*")[0].rpartition("/")[0] for pattern in patterns})


def _writes(step: graph.Step, line: str) -> tuple[str, ...]:
    return (
        f"artifacts/{step.makes}/*",
        # Each name ends as no plan's does, so a step cannot write one under the id of a run that it invents.
        f"runs/*/logs/{step.name}-*.log",
        f"runs/*/status/{step.name}.json",
        f"runs/*/endings/{step.name}.json",
        *([f"scratch/{step.name}/*"] if step.scratch else []),
        *([f"models/{line}/*"] if step.kind == graph.StepKind.PUBLISH else []),
    )


def _gc_access(config: LineConfig) -> Access:
    # All lines share artifacts and runs, so what any line names must be seen. Neither an alias nor an entry of the
    # audit trail goes, and of versions those of the line alone.
    models = f"models/{config.line}"
    return Access(
        reads=(
            _PLANS,
            "artifacts/*/_manifest.json",
            "models/*/aliases/*",
            "models/*/audit/*",
            "models/*/versions/*/manifest.json",
            "histories/*/datasets/*",
            MARK_PATH,
        ),
        lists=("artifacts/*", "scratch/*", "runs/*", "models/*", "histories/*"),
        writes=(MARK_PATH,),
        deletes=("artifacts/*", "scratch/*", "runs/*", f"{models}/versions/*", f"{models}/moving/*"),
        aborts=True,
        signs=False,
    )


def _planner_access(config: LineConfig) -> Access:
    versions = f"models/{config.line}/versions"
    pages = {f"artifacts/{step.makes}/*/{step.report}" for step in graph.STEPS if step.report}
    endings = "runs/*/endings/*.json"
    histories = [f"histories/{line}/*" for line in (config.line, config.data.history_of) if line]
    return Access(
        reads=(
            _PLANS,
            endings,
            "runs/*/status/*.json",
            "artifacts/*/_manifest.json",
            *sorted(pages),
            f"models/{config.line}/aliases/*",
            # The newest entry says which alias is an old one that was put back.
            f"models/{config.line}/audit/*",
            f"{versions}/*/manifest.json",
            f"{versions}/*/recipe.json",
            # What the line has evaluated, and what the line did that it names.
            *histories,
            f"artifacts/*/{graph.EVALUATED_PROMPTS}",
            ".probe/*",
            MARK_PATH,
        ),
        # A name in `data.history_of` that no line has is answered with the nearest one.
        lists=("runs/*", "artifacts/*", "histories/*"),
        writes=(_PLANS, "runs/*/renewed/*.json", endings, histories[0], ".probe/*"),
        # An earlier try's ending is removed when the next try begins.
        deletes=(endings, ".probe/*"),
        sources=tuple(f"{_literal(uri)}/*" for uri in config.sources.declared_uris().values()),
        pins_sources=True,
    )


def _step_access(config: LineConfig, step: graph.Step) -> Access:
    own, scratch = f"artifacts/{step.makes}/*", [f"scratch/{step.name}/*"] if step.scratch else []
    reads, sources = [_PLANS, own, *scratch], list[str]()
    for item in step.reads:
        if graph.producer(item.name) is not None:
            reads.append(f"artifacts/{item.name}/*")
        elif item.name == graph.HISTORY:
            reads.append(f"histories/{config.line}/*.txt")
        elif item.name == graph.START and config.train.start == "base":
            continue
        elif item.name == graph.EARLIER_ADAPTERS:
            versions = f"models/{config.line}/versions/*"
            reads += [f"{versions}/manifest.json", f"{versions}/{graph.ADAPTER_PART}/*"] if config.merge.soup else []
        elif item.name in graph.VERSION_PARTS:
            reads += [f"models/{config.line}/versions/*/{name}" for name in _version_files(item.name)]
        elif item.only_with is None or getattr(config.sources, item.only_with) is not None:
            sources += _source_patterns(config, item)

    moves: tuple[str, ...] = ()
    retains: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()
    if step.kind == graph.StepKind.PUBLISH:
        models = f"models/{config.line}"
        # Who moves an alias by hand tries first whether the store honours conditional writes.
        probes = (".probe/*",)
        reads += [f"{models}/*", MARK_PATH, *probes]
        # The document of a move that is over.
        moves = (f"{models}/moving/*",)
        retains = (f"{models}/versions/*", f"{models}/audit/*") if config.publish.retention_days else ()
    return Access(
        reads=tuple(dict.fromkeys(reads)),
        writes=(*_writes(step, config.line), *probes),
        # Files of attempts, and never a manifest, which lies one folder higher.
        deletes=(f"{own}/*/*", *scratch, *moves, f"runs/*/endings/{step.name}.json", *probes),
        retains=retains,
        sources=tuple(sources),
    )


def _version_files(source: str) -> list[str]:
    """Return the files of a version that a step gets, and its manifest, by which it checks them."""
    parts = graph.VERSION_PARTS[source]
    return ["manifest.json", *(part if PurePosixPath(part).suffix else f"{part}/*" for part in parts)]


def _source_patterns(config: LineConfig, item: graph.Input) -> list[str]:
    """Return the files of a source that a step reads."""
    uri = config.sources.declared_uris().get(item.name)
    if uri is None:
        return []
    globs = FILE_SETS[item.files]
    # A glob without a folder also names the files in folders of the source.
    names = [f"{folder}{glob}" for glob in globs for folder in ("", "*/")] or ["*"]
    return [f"{_literal(uri)}/{name}" for name in names]


def _literal(uri: str) -> str:
    """Return a line's URI as a pattern that matches itself alone: `s3://*/x` must not open every bucket."""
    return re.sub(r"[*?$]", r"${\g<0>}", uri.rstrip("/"))
