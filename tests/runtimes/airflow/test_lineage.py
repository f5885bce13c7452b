"""Assets and OpenLineage's datasets of real artifacts: names that stay, versions that follow the content."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core import graph
from qlora_retrain.pipeline import make_plan
from qlora_retrain.pipeline.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
RunAll = Callable[[Plan], dict[str, int]]


def lineage_of(plan: Plan, step: str) -> tuple[dict[str, str], dict[str, str]]:
    """The versions of what a step read and made, by name, as OpenLineage's provider asks the task for them."""
    from airflow.providers.openlineage.extractors.base import DefaultExtractor

    from qlora_retrain.runtimes.airflow.operators import StepOperator

    task = StepOperator(task_id=step, step=step, line=plan.line)
    task.plan = plan
    extracted = DefaultExtractor(task).extract_on_complete(task_instance=None)
    assert extracted is not None

    def versions(datasets: list[Any]) -> dict[str, str]:
        return {item.name: item.facets["version"].datasetVersion for item in datasets}

    return versions(extracted.inputs), versions(extracted.outputs)


def test_what_one_step_made_is_what_the_next_read(made_plan: Plan, run_all: RunAll, line: Path) -> None:
    assert set(run_all(made_plan).values()) == {0}
    store = made_plan.root.removeprefix("file://")
    root = f"{store}/intents"
    lineages = {step.name: lineage_of(made_plan, step.name) for step in graph.STEPS}
    for step in graph.STEPS:
        _, outputs = lineages[step.name]
        assert outputs[f"{root}/{step.makes}"] == made_plan.step(step.name).key
        for reader in graph.STEPS:
            if step.makes in {item.name for item in reader.reads}:
                assert lineages[reader.name][0][f"{root}/{step.makes}"] == made_plan.step(step.name).key
    sources = made_plan.sources
    assert sources["raw_data"] is not None
    assert sources["base_model"] is not None
    assert lineages["validate_data"][0] == {
        sources[name].uri.removeprefix("file://"): sources[name].key()  # type: ignore[union-attr]
        for name in ("raw_data", "base_model")
    }

    # The model has the name of its asset, and the next run's verdict is about it.
    version = lineages["publish"][1][f"{store}/models/intents"]
    rows = line.parent / "tickets.jsonl"
    rows.write_text(rows.read_text() + rows.read_text().replace("order", "box"))
    following = make_plan.make_plan(line, made_plan.root)
    assert lineage_of(following, "evaluate")[0][f"{store}/models/intents"] == version
    # Nothing was made yet.
    assert lineage_of(following, "evaluate")[1] == {}


def test_a_task_that_read_no_plan_has_no_lineage(made_plan: Plan) -> None:
    from qlora_retrain.runtimes.airflow.operators import StepOperator

    task = StepOperator(task_id="evaluate", step="evaluate", line="intents")
    assert task.get_openlineage_facets_on_complete(None) is None


def test_parsing_the_dags_imports_no_optional_package() -> None:
    program = (
        "import runpy, sys; runpy.run_path('dags/retrain.py'); import qlora_retrain.runtimes.airflow.notify_operators;"
        "print([name for name in sys.modules if name.partition('.')[0] in ('openlineage', 'apprise', 'aiosmtplib')])"
    )
    project = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr
