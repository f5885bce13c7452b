"""Published models in words, for the verbs of `qlora-retrain models`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qlora_retrain.storage import version_parts
from qlora_retrain.storage.rejections import is_rejected_name

if TYPE_CHECKING:
    from qlora_retrain.pipeline.version_details import VersionDetails
    from qlora_retrain.pipeline.version_diff import Difference, VersionDiff
    from qlora_retrain.pipeline.version_summary import LineSummary, VersionSummary
    from qlora_retrain.storage.repair import Finding


def line(summary: LineSummary) -> Iterator[str]:
    """Yield the aliases, a line for each of the newest versions, and what cannot be read."""
    for name, state in sorted(summary.aliases.items()):
        # One whose manifest was lost is rejected by its name, without a content.
        num_rejected = len(state.rejected) + sum(r.content_hash is None for r in state.rejections)
        rejected = f", {num_rejected} rejected" if num_rejected else ""
        yield f"{summary.line}@{name}: {state.version}, generation {state.generation}{rejected}"
    for entry in summary.versions:
        aliases = ", ".join(summary.alias_names(entry.release.version))
        rejecting = [n for n, state in summary.aliases.items() if is_rejected_name(state, entry.release.version)]
        rejected = f"  rejected for {', '.join(rejecting)}" if rejecting else ""
        yield f"{entry.release.version}  {_measured(entry)}  {aliases}".rstrip() + rejected
    hidden = summary.num_versions - len(summary.versions)
    if hidden:
        yield f"{hidden} further folders of versions: older ones, unfinished ones, and those that cannot be read"
    yield from summary.faults


def version(details: VersionDetails) -> Iterator[str]:
    """Yield what there is to know of a version."""
    entry, release = details.summary, details.summary.release
    size_mib = sum(file.size_bytes for file in release.files) / 2**20
    yield f"{release.line} {release.version}: {len(release.files)} files, {size_mib:,.1f} MiB"
    yield f"parts: {', '.join(version_parts.names(release)) or 'none'}"
    yield f"named by: {', '.join(details.named_by) or 'no alias'}"
    yield f"planned at {release.created_at} for run {release.provenance.get('run_id', '?')}"
    for name, state in details.moves:
        yield f"{state.at}  {name} {state.generation}  {state.actor}  {state.reason}"
    yield f"verdict: {': '.join(filter(None, entry.verdict))}"
    yield f"merged form: {': '.join(filter(None, entry.merged_verdict))}"
    if entry.metric:
        yield f"{entry.metric}: {entry.measured}; the best version before: {entry.best_before or 'none'}"
    for name, rejection in details.rejections:
        own = (
            "" if rejection.version == release.version else f" with {rejection.version}, of the same content or recipe"
        )
        yield f"rejected for {name}{own}: {rejection.actor} at {rejection.at} ({rejection.reason})"
    yield f"content {release.content_hash}"
    yield f"manifest {release.sha256}"
    yield from details.faults


def difference(diff: VersionDiff) -> Iterator[str]:
    """Yield what differs between two versions, by group."""
    groups: dict[str, Sequence[Difference]] = {
        "data": diff.data,
        "files": diff.sources,
        "recipe": diff.recipe,
        "base": diff.base,
        "code": diff.code,
        "versions": diff.versions,
    }
    for name, changes in groups.items():
        for change in changes:
            yield f"{name}: {change.name}: {change.first} -> {change.second}"
    for pair in diff.metrics:
        yield f"metric: {pair.name}: {pair.first or '-'} -> {pair.second or '-'}"
    if not any(groups.values()):
        yield "data, recipe, base and code are the same"
    if not diff.same_judgement:
        yield "they were judged by other rules or other evaluation data, so their metrics cannot be compared"


def findings(line_name: str, faults: Sequence[Finding], *, is_dry_run: bool) -> Iterator[str]:
    """Yield each fault with what became of it."""
    if not faults:
        yield f"{line_name}: nothing to mend; the versions that aliases name are what was published"
    for fault in faults:
        if fault.is_mended:
            remedy = f"would be mended: {fault.remedy}" if is_dry_run else f"mended: {fault.remedy}"
        else:
            remedy = f"cannot be mended: {fault.remedy}"
        yield f"{fault.subject}: {fault.fault}; {remedy}"


def _measured(entry: VersionSummary) -> str:
    metric = f"{entry.metric} {entry.measured}" if entry.metric and entry.measured else "no metric"
    return f"{entry.verdict[0]}  {metric}"
