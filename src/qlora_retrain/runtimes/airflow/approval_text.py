"""What an approver reads: the verdict in numbers, the differences from the version in production, and the reports.

Everything stands in one block of code, since reports and settings hold what a line's author wrote: nothing of it
becomes a link or a picture of the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_retrain.core import visible_text
from qlora_retrain.core.errors import Problem
from qlora_retrain.pipeline import version_summary
from qlora_retrain.pipeline.champion_settings import read_recipe
from qlora_retrain.storage import moves, registry
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

# Airflow keeps the text in its database, and a person reads it on one page.
_MAX_CHARACTERS = 12_000
_NAME_WIDTH = 34
# The artifacts whose numbers count for the decision, the most important first.
_JUDGED = ("evaluation", "model", "dataset")


def body(store: Store, line: str, version: str, current: str, requester: str | None) -> str:
    """Return the text in Markdown.

    Args:
        store: The store.
        line: The line.
        version: The version that is asked about.
        current: The version in production, or `none`.
        requester: The user of Airflow who started the run; None: nobody.

    Raises:
        Problem: If one of the versions cannot be read.
    """
    release = registry.read_release(store, line, version)
    judged_against = read_recipe(store, release).get("champion")
    champion = None if current == moves.NOTHING else registry.read_release(store, line, current)
    summary = version_summary.summarize(store, release)
    lines = [
        f"verdict     {': '.join(filter(None, summary.verdict))}",
        f"as shipped  {': '.join(filter(None, summary.merged_verdict))}",
        "",
        f"line        {line}",
        f"version     {version}",
        f"production  {current}",
        f"judged against {judged_against or 'no version'}",
        f"asked by    {requester or 'nobody: a schedule or an asset started the run'}",
        f"run         {release.provenance.get('run_id')}",
        "",
        *_number_lines(release, champion),
        "",
        *_setting_lines(store, release, champion),
        "",
        *(f"report      {store.uri}/{registry.version_folder(line, version)}/{f.path}" for f in _reports(release)),
    ]
    text = visible_text.escape_controls("\n".join(lines))
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[:_MAX_CHARACTERS]}\n... (cut; the reports have the rest)"
    # Longer than any fence in the text, so that the text cannot end the block.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _number_lines(release: Release, champion: Release | None) -> Iterator[str]:
    yield f"{'number':<{_NAME_WIDTH}} {'this version':>16} {'production':>16}"
    for artifact in _JUDGED:
        numbers = release.numbers.get(artifact, {})
        before: Mapping[str, Any] = champion.numbers.get(artifact, {}) if champion else {}
        for name, value in numbers.items():
            label = f"{artifact}.{name}"
            yield f"{label:<{_NAME_WIDTH}} {_formatted(value):>16} {_formatted(before.get(name)):>16}"


def _setting_lines(store: Store, release: Release, champion: Release | None) -> Iterator[str]:
    if champion is None:
        yield "settings: nothing to compare with, since this is the first version in production"
        return
    try:
        before, now = (read_recipe(store, version).get("steps") for version in (champion, release))
    except Problem as error:
        yield f"settings: cannot be compared: {error}"
        return
    if before is None or now is None:
        yield "settings: cannot be compared, since a version has no recipe"
        return
    changes = [
        f"  {step}.{name}: {json.dumps(before.get(step, {}).get(name))} -> {json.dumps(value)}"
        for step, settings in now.items()
        for name, value in settings.items()
        if before.get(step, {}).get(name) != value
    ]
    yield from ("settings that differ:", *changes) if changes else ("settings: as in production",)


def _reports(release: Release) -> Iterator[Any]:
    return (file for file in release.files if file.path.startswith("reports/"))


def _formatted(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
