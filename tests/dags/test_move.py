"""The DAGs that move an alias: what their forms take, and that no line takes their names."""

from __future__ import annotations

import importlib.util
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest

from qlora_retrain.runtimes.airflow.move_request import APPROVAL_DAG, DAG_IDS, MOVE_DAG

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
DAGS = Path(__file__).resolve().parents[2] / "dags"
LINE = "line: {line}\nsources: {{raw_data: tickets.jsonl, base_model: model}}\npublish: {{approval: {approval}}}\n"


@pytest.fixture
def pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_RETRAIN_PIPELINES", str(tmp_path))
    return tmp_path


def load(name: str) -> ModuleType:
    """Load a DAG file as Airflow's DAG processor does: as a fresh module."""
    spec = importlib.util.spec_from_file_location("dag_file", DAGS / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_dags_wait_for_a_person_beside_all_others_and_render_nothing(pipelines: Path) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    module = load("move.py")
    for dag, task_id, titles in (
        (module.move_dag, "move", ("Promote or roll back", "Move the alias")),
        (module.approval_dag, "approve", ("Approval of a version", "Ask an approver, then move")),
    ):
        assert (dag.schedule, dag.catchup, dag.is_paused_upon_creation) == (None, False, False)
        assert dag.max_active_runs == 1000
        (task,) = dag.tasks
        assert (task.task_id, task.template_fields, task.retries) == (task_id, (), 2)
        assert (dag.dag_display_name, task.task_display_name) == titles
        assert task.execution_timeout <= timedelta(hours=1)
        assert DagSerialization.to_dict(dag)
    assert (module.move_dag.dag_id, module.approval_dag.dag_id) == (MOVE_DAG, APPROVAL_DAG)
    assert module.approval_dag.get_task("approve").defaults == ["Reject"]
    # No plan, no address, no gate, and no version that a rollback has rejected.
    assert set(module.move_dag.params) == {"line", "action", "version", "from_version", "alias", "reason"}
    assert set(module.approval_dag.params) == {"line", "version", "from_version"}


def test_a_line_that_asks_ends_with_the_request_and_still_runs_once_at_a_time(pipelines: Path) -> None:
    for line, approval in (("tickets", "true"), ("mails", "false")):
        (pipelines / f"{line}.yaml").write_text(LINE.format(line=line, approval=approval))
    dags = load("retrain.py").DAGS
    assert dags["tickets"].get_task("request_approval").upstream_task_ids == {"publish"}
    assert dags["tickets"].get_task("publish").alias == "staging"
    assert dags["tickets"].max_active_runs == 1
    assert not dags["mails"].has_task("request_approval")
    assert dags["mails"].get_task("publish").alias == "production"


@pytest.mark.parametrize("name", DAG_IDS)
def test_no_line_and_no_broken_file_takes_the_name_of_such_a_dag(pipelines: Path, name: str) -> None:
    (pipelines / f"{name}.yaml").write_text(LINE.format(line=name, approval="false"))
    ((dag_id, dag),) = load("retrain.py").DAGS.items()
    assert dag_id not in DAG_IDS
    assert "Airflow has another DAG of that name" in (dag.doc_md or "")
