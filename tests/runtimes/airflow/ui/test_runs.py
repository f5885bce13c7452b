"""The reports of a DAG run: found by the run itself, shown as they were written, and only to who may read the runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest

from qlora_retrain.core.errors import DataRefused
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes.airflow import dag_run
from qlora_retrain.runtimes.airflow.ui import headers
from qlora_retrain.storage.store import Store

pytestmark = pytest.mark.filterwarnings("ignore")  # Airflow's own, while it starts
Browser = Callable[..., Any]
Start = Callable[..., tuple[str, str]]


@pytest.fixture
def start(browser: Browser) -> Start:
    """Start a DAG run through Airflow's REST API; return the address of its reports, and its id in the store."""

    def start_run(dag_id: str = "intents", **conf: Any) -> tuple[str, str]:
        answer = browser().post(f"/api/v2/dags/{dag_id}/dagRuns", json={"logical_date": None, "conf": conf})
        assert answer.status_code == 200, answer.text
        run = answer.json()
        values = {"dag_id": dag_id, "run_id": run["dag_run_id"], "run_after": datetime.fromisoformat(run["run_after"])}
        address = f"/qlora-retrain/runs/{dag_id}/{quote(run['dag_run_id'], safe='')}"
        return address, dag_run.run_id_of(SimpleNamespace(**values))

    return start_run


@pytest.fixture
def finished(start: Start, line: Path, store: Store, run_all: Callable[[Plan], dict[str, int]]) -> tuple[str, Plan]:
    """The address of a run whose steps have all run, and its plan."""
    address, run_id = start()
    plan = make_plan.make_plan(line, store.uri, run=run_id)
    assert set(run_all(plan).values()) == {0}
    return address, plan


def test_a_run_shows_how_it_ended_and_each_of_its_reports(browser: Browser, finished: tuple[str, Plan]) -> None:
    address, plan = finished
    page = browser("reader").get(address).text
    assert "Published 2" in page
    assert plan.run_id in page
    assert f'src="{address}/plan"' in page
    for tab, task, text in (
        ("Data", "validate_data", '"data"\n'),
        ("Training", "train_qlora", '"training"\n'),
        ("Evaluation", "evaluate", '"evaluation"\n'),
        ("Certificate", "merge_adapter", '"merge"\n'),
    ):
        assert f'src="{address}/{task}"' in browser("reader").get(f"{address}?tab={tab}").text
        report = browser("reader").get(f"{address}/{task}")
        assert (report.status_code, report.text) == (200, text)
        assert report.headers["content-security-policy"] == headers.REPORT_POLICY
    # A step without a report shows the run.
    for task in ("plan", "quantize_model", "publish"):
        assert f"Run {plan.run_id} of intents" in browser("reader").get(f"{address}/{task}").text


def test_reports_need_the_permission_to_read_the_dags_runs(
    browser: Browser, finished: tuple[str, Plan], start: Start
) -> None:
    address, _ = finished
    unplanned, _ = start("secrets")
    for path in ("", "?tab=Data", "/plan", "/validate_data"):
        assert browser(None).get(address + path).status_code == 401
        assert browser("nobody").get(address + path).status_code == 403
        assert browser("clerk").get(address + path).status_code == 200
        assert browser("clerk").get(unplanned + path).status_code == 403
        assert browser("reader").get(unplanned + path).status_code == 404  # it has no plan


def test_a_refusal_is_shown_with_its_reason(
    browser: Browser, start: Start, line: Path, store: Store, small_steps: dict[str, Callable[..., StepResult]]
) -> None:
    address, run_id = start()
    plan = make_plan.make_plan(line, store.uri, run=run_id)

    def refuse(*inputs: Any, **folders: Any) -> StepResult:
        (folders.get("dataset") or inputs[-1]).joinpath("report.html").write_text("too many <bad> rows")
        return StepResult({}, DataRefused("half of the rows are <bad>"))

    execute.run_step(plan, "validate_data", lambda: wrap(small_steps["validate_data"], refuse))
    page = browser().get(address).text
    assert "half of the rows are &lt;bad&gt;" in page
    assert "train_qlora: no report yet" in page
    assert browser().get(f"{address}/validate_data").text == "too many <bad> rows"


def wrap(step: Callable[..., StepResult], refuse: Callable[..., StepResult]) -> Callable[..., StepResult]:
    """Return a step with the parameters of another one."""
    import functools

    return functools.wraps(step)(refuse)


def test_the_plan_of_another_line_is_not_shown(
    browser: Browser, finished: tuple[str, Plan], start: Start, store: Store
) -> None:
    _, plan = finished
    assert browser().get(start(resume_run=plan.run_id)[0]).status_code == 200
    for conf in ({"resume_run": plan.run_id}, {"plan": plan.uri}):
        answer = browser().get(start("secrets", **conf)[0])
        assert (answer.status_code, plan.run_id in answer.text) == (404, False)


@pytest.mark.parametrize(
    "path", ["no-line/x", "intents/none", "intents/a%00b", "intents/..%2f..", "..%2f../x", "qlora-retrain-move/x"]
)
def test_an_unknown_run_is_not_found(browser: Browser, store: Store, path: str) -> None:
    assert browser().get(f"/qlora-retrain/runs/{path}").status_code == 404
    assert browser().get(f"/qlora-retrain/runs/{path}/plan").status_code == 404


def test_an_unknown_task_is_not_found(browser: Browser, finished: tuple[str, Plan]) -> None:
    address, _ = finished
    for task in ("none", "report.html", "..%2fplan.json", "validate_data%00"):
        assert browser().get(f"{address}/{task}").status_code == 404


def test_airflow_shows_the_tab_and_the_page(browser: Browser) -> None:
    answer = browser().get("/api/v2/plugins").json()
    (plugin,) = (plugin for plugin in answer["plugins"] if plugin["name"] == "qlora_retrain")
    views = {view["name"]: (view["destination"], view["href"]) for view in plugin["external_views"]}
    assert views == {
        "Reports": ("dag_run", "qlora-retrain/runs/{DAG_ID}/{RUN_ID}"),
        "Models": ("nav", "qlora-retrain/models"),
    }
    assert browser().get("/api/v2/plugins/importErrors").json()["total_entries"] == 0
