"""A task links to the pages of its run, whatever the run is called and wherever Airflow is served."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qlora_retrain.core import graph

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
KEY = SimpleNamespace(dag_id="tickets", run_id="manual__2026-01-31T03:00:00+00:00/../x?#", task_id="evaluate")
RUN = "manual__2026-01-31T03%3A00%3A00%2B00%3A00%2F..%2Fx%3F%23"


@pytest.mark.parametrize(
    ("base_url", "prefix"), [(None, ""), ("https://host/airflow/", "/airflow"), ("http://host:8080", "")]
)
def test_a_link_is_a_path_on_airflows_own_server(
    monkeypatch: pytest.MonkeyPatch, base_url: str | None, prefix: str
) -> None:
    from qlora_retrain.runtimes.airflow import links

    if base_url:
        monkeypatch.setenv("AIRFLOW__API__BASE_URL", base_url)
    pages = f"{prefix}/qlora-retrain/runs/tickets/{RUN}"
    assert links.ReportLink().get_link(None, ti_key=KEY) == f"{pages}/evaluate"  # type: ignore[arg-type]
    assert links.RunLink().get_link(None, ti_key=KEY) == f"{pages}/plan"  # type: ignore[arg-type]


def test_a_step_without_a_report_has_no_link_to_one() -> None:
    from qlora_retrain.runtimes.airflow import links

    names = {step.name: [link.name for link in links.links_of(step.name)] for step in graph.STEPS}
    assert names["evaluate"] == ["Report", "Run page"]
    assert names["publish"] == names["quantize_model"] == ["Run page"]


def test_the_tasks_of_a_lab_share_no_page() -> None:
    from qlora_retrain.runtimes.airflow.local import LocalStepOperator

    lab_task = LocalStepOperator(task_id="evaluate", step="evaluate", line="tickets", plans_key="return_value")
    assert list(lab_task.operator_extra_links) == []
