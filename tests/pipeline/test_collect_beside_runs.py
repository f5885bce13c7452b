"""Runs go on while collections remove all that nothing names, again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qlora_retrain.core import graph
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, garbage, make_plan, status
from qlora_retrain.pipeline.collect import collect
from qlora_retrain.storage import collection_mark, open_store
from qlora_retrain.storage.artifact import check_files

ROUNDS, MAX_ROUNDS = 3, 30


@pytest.mark.usefixtures("own_signal_handlers")
def test_a_run_that_needs_old_artifacts_ends_well_beside_collections(
    line: Path,
    root_uri: str,
    small_steps: dict[str, Callable[..., StepResult]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each round's plan names what the round before has made, when no plan of that round counts any more."""
    monkeypatch.setattr(collection_mark, "_POLL_SECONDS", 0.01)
    errors = list[BaseException]()
    # Without a version of the line no plan counts for longer than 30 days.
    steps = [step for step in graph.STEPS if step.kind != graph.StepKind.PUBLISH]
    num_removed = number = 0
    # An empty folder would be refused. This plan counts no more.
    make_plan.make_plan(line, root_uri, at=datetime.now(UTC) - timedelta(days=40))

    # A collection removes something where it reads the names before the round's plan is written, which is chance.
    while number < ROUNDS or (num_removed == 0 and number < MAX_ROUNDS):
        # The files of this round are new, and those of earlier ones are older than an attempt that is under way.
        at, is_over = datetime.now(UTC) + timedelta(days=40 * number), threading.Event()
        monkeypatch.setattr(garbage, "ATTEMPT_DAYS", 40 * number)

        def go_on_collecting(at: datetime = at, is_over: threading.Event = is_over) -> None:
            nonlocal num_removed
            try:
                while not is_over.is_set():
                    num_removed += len(collect(open_store(root_uri), is_dry_run=False, at=at).items)
            except BaseException as error:
                errors.append(error)
                raise

        collector = threading.Thread(target=go_on_collecting)
        collector.start()
        try:
            plan = make_plan.make_plan(line, root_uri, at=at)
            for step in steps:
                ending = execute.run_step(plan, step.name, lambda step=step: small_steps[step.name])  # type: ignore[misc]
                assert ending.code == 0, ending.reason
        finally:
            is_over.set()
            collector.join()
        for step in steps:
            manifest = status.find_manifest(plan, step.name)
            assert manifest is not None
            check_files(open_store(root_uri), manifest)
        number += 1
    assert errors == []
    assert num_removed > 0
