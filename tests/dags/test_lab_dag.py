"""The DAG of a lab: only for lines that the platform names, mapped over what task 0 planned, and rendering nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_retrain.core import graph

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
DAGS = Path(__file__).resolve().parents[2] / "dags"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    from airflow.dag_processing.dagbag import DagBag

    lines = tmp_path / "pipelines"
    lines.mkdir()
    for line in ("tickets", "mails"):
        (lines / f"{line}.yaml").write_text(f"line: {line}\nsources: {{raw_data: rows.jsonl, base_model: model}}\n")
    (lines / "broken.yaml").write_text("line: broken\ntrain: {rank: 0}\n")
    (tmp_path / "platform.yaml").write_text("labs: [tickets, broken, absent]\n")
    monkeypatch.setenv("QLORA_RETRAIN_PIPELINES", str(lines))
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(tmp_path / "platform.yaml"))
    bag = DagBag(str(DAGS / "lab.py"))
    assert bag.import_errors == {}
    assert list(bag.dags) == ["tickets-lab"]
    return bag.dags["tickets-lab"]


def test_steps_follow_the_plan_and_what_points_share(lab) -> None:  # type: ignore[no-untyped-def]
    edges = {(up, task.task_id) for task in lab.tasks for up in task.upstream_task_ids}
    assert edges == {
        ("plan", "validate_data"), ("plan", "list_bases"), ("list_bases", "bases.quantize_model"),
        ("validate_data", "points.train_qlora"), ("bases.quantize_model", "points.train_qlora"),
        ("plan", "points.train_qlora"), ("points.train_qlora", "points.evaluate"),
        ("points.evaluate", "points.merge_adapter"), ("points.merge_adapter", "report"),
    }  # fmt: skip
    assert lab.schedule is None
    steps = [task for task in lab.tasks if hasattr(task, "plans_key")]
    assert {task.task_id.rpartition(".")[2] for task in steps} == {s.name for s in graph.STEPS} - {"publish"}
    assert {task.line for task in steps} == {"tickets-lab"}
    # What a line's author writes is never rendered.
    assert [name for task in steps for name in task.template_fields] == []
    assert all(task.execution_timeout for task in lab.tasks)


@pytest.mark.parametrize(
    ("name", "value"),
    [("vary", "train.rank=4"), ("vary", [4]), ("seeds", 0), ("judge_fraction", 0), ("judge_fraction", 0.6)],
)
def test_the_form_refuses_what_a_lab_would_refuse(lab, name: str, value: object) -> None:  # type: ignore[no-untyped-def]
    from airflow.sdk.exceptions import ParamValidationError

    with pytest.raises(ParamValidationError):
        lab.params.get_param(name).resolve(value)
