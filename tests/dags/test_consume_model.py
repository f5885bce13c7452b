"""The DAG of a consumer: only for lines that the platform names, on the line's asset, and rendering nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
DAGS = Path(__file__).resolve().parents[2] / "dags"
ENTRY = {"folder": "/srv/models/tickets", "questions": "/srv/questions.jsonl", "min_right_fraction": 0.8}


@pytest.fixture
def set_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(tmp_path / "platform.yaml"))
    monkeypatch.setenv("QLORA_RETRAIN_PIPELINES", str(tmp_path / "lines"))
    (tmp_path / "lines").mkdir()

    def write(**settings: object) -> None:
        (tmp_path / "platform.yaml").write_text(yaml.safe_dump(settings))

    return write


def parse(name: str) -> dict[str, Any]:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(DAGS / name))
    assert bag.import_errors == {}
    return dict(bag.dags)


def test_a_line_that_the_platform_names_is_followed_and_no_other(set_platform: Any) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    set_platform()
    assert parse("consume_model.py") == {}
    set_platform(consumers={"tickets": ENTRY})
    ((dag_id, dag),) = parse("consume_model.py").items()
    assert (dag_id, dag.max_active_runs, dag.catchup, dag.is_paused_upon_creation) == (
        "tickets-consume", 1, False, False,
    )  # fmt: skip
    (condition,) = dag.timetable.asset_condition.objects
    assert condition.name == "tickets"
    assert {task.task_id: task.upstream_task_ids for task in dag.tasks} == {"pull": set(), "ask": {"pull"}}
    assert [name for task in dag.tasks for name in task.template_fields] == []
    assert all(task.execution_timeout for task in dag.tasks)
    assert DagSerialization.to_dict(dag)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("questions", []),
        ("questions", "/etc/passwd"),
        ("questions", [{"question": "a"}]),
        ("questions", [{"question": "a", "answer": "b", "file": "/etc/passwd"}]),
        ("min_right_fraction", 1.5),
    ],
)
def test_the_form_takes_questions_and_no_path(set_platform: Any, name: str, value: object) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    set_platform(consumers={"tickets": ENTRY})
    (dag,) = parse("consume_model.py").values()
    assert dag.params.get_param("min_right_fraction").resolve() == 0.8
    with pytest.raises(ParamValidationError):
        dag.params.get_param(name).resolve(value)


def test_no_line_takes_the_dag_of_a_consumer_or_a_lab_away(set_platform: Any, tmp_path: Path) -> None:
    set_platform(consumers={"tickets": ENTRY}, labs=["tickets"])
    for name in ("tickets-consume", "tickets-lab"):
        (tmp_path / "lines" / f"{name}.yaml").write_text(
            f"line: {name}\nsources: {{raw_data: rows.jsonl, base_model: model}}\n"
        )
    dags = parse("retrain.py")
    assert len(dags) == 2
    assert not {"tickets-consume", "tickets-lab"} & set(dags)
    assert all("Airflow has another DAG of that name" in dag.doc_md for dag in dags.values())
