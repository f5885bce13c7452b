"""A lab's plans share the line's keys where they are equal, and leave its history and versions alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lab import experiment
from qlora_retrain.lab.grid import Point
from qlora_retrain.lab.options import LabOptions
from qlora_retrain.lab.plans import LabPlanner, lab_line
from qlora_retrain.pipeline import execute, make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import key_admin, open_store
from tests.conftest import ticket_rows, write_jsonl

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
RANKS = [Point((("train.rank", rank),)) for rank in (4, 8)]


def plans(
    line: Path, root: str, points: list[Point] = RANKS, at: datetime = NOW, overrides: tuple[str, ...] = ()
) -> list[Plan]:
    planner = LabPlanner.for_line(line, root, overrides, 0.1, at)
    return planner.write([planner.plan(planner.resolve(point)) for point in points])


def keys(plan: Plan) -> dict[str, str]:
    return {graph.step(step.name).makes: step.key for step in plan.steps}


def files(root: str, folder: str = "") -> set[str]:
    return {entry.path for entry in open_store(root).list(folder)}


def test_points_share_data_and_base_with_each_other_and_the_base_with_the_line(line: Path, root_uri: str) -> None:
    own = keys(make_plan.make_plan(line, root_uri))
    small, large = map(keys, plans(line, root_uri))
    assert small["base_nf4"] == large["base_nf4"] == own["base_nf4"]
    assert small["dataset"] == large["dataset"] != own["dataset"]
    assert len({small["adapter"], large["adapter"], own["adapter"]}) == 3


def test_nothing_is_remembered_or_published_for_the_line(line: Path, root_uri: str) -> None:
    lab = plans(line, root_uri)[0]
    assert files(root_uri, "histories") == set()
    assert files(root_uri, "models") == set()
    assert (lab.line, lab.target, lab.champion) == ("intents-lab", None, None)
    assert lab.step(graph.producer_name("release")).config["promote_to"] is None
    # Refused for everybody who loads it, if anything in it did not follow from its settings.
    assert Plan.load(lab.uri) == lab


def test_a_lab_that_is_begun_again_has_the_same_plans_and_writes_nothing(line: Path, root_uri: str) -> None:
    first = plans(line, root_uri)
    before = files(root_uri)
    assert plans(line, root_uri, at=NOW + timedelta(hours=1)) == first
    assert files(root_uri) == before
    # A larger time budget is another plan of the same results.
    longer = plans(line, root_uri, overrides=("train.max_hours=5",))
    assert [keys(plan) for plan in longer] == [keys(plan) for plan in first]
    assert longer[0].run_id != first[0].run_id


def test_runs_of_the_line_before_and_between_make_nothing_of_a_lab_again(
    line: Path, root_uri: str, run_all: Callable[[Plan], dict[str, int]]
) -> None:
    before = keys(plans(line, root_uri)[0])
    line.write_text(line.read_text() + "publish: {promote_to: null}\n")
    run_all(make_plan.make_plan(line, root_uri))
    after = plans(line, root_uri)[0]
    assert keys(after)["dataset"] == before["dataset"]

    # With other data, what the line evaluated is an input of both, and the lab's steps find it.
    write_jsonl(line.parent / "tickets.jsonl", ticket_rows(40))
    history_before = files(root_uri, "histories/intents")
    lab = plans(line, root_uri)[0]
    assert lab.history is not None
    assert files(root_uri, "histories/intents") == history_before
    assert files(root_uri, "histories/intents-lab") == {f"histories/intents-lab/{lab.history.sha256}.txt"}


def test_no_run_of_a_lab_goes_on_from_production_which_has_learnt_the_rows_that_judge(
    line: Path, root_uri: str, run_all: Callable[[Plan], dict[str, int]]
) -> None:
    overrides = ("train.start=champion", "merge.soup=2")
    assert set(run_all(make_plan.make_plan(line, root_uri, overrides=overrides)).values()) == {0}
    write_jsonl(line.parent / "tickets.jsonl", ticket_rows(40))
    assert make_plan.make_plan(line, root_uri, overrides=overrides).start is not None
    for lab in plans(line, root_uri, overrides=overrides):
        assert (lab.start, lab.earlier_adapters) == (None, ())
        assert lab.step("train_qlora").config["start"] == "base"
        assert Plan.load(lab.uri) == lab


def test_a_lab_applies_none_of_the_lines_limits(line: Path, root_uri: str) -> None:
    line.write_text(
        line.read_text() + "evaluate: {min_accuracy: 0.99, min_prompts: 500}\ndata: {min_eval_prompts: 500}\n"
    )
    lab = plans(line, root_uri)[0]
    settings = lab.step(graph.producer_name("evaluation")).config
    assert (settings["min_accuracy"], settings["min_prompts"]) == (None, 1)
    # The line's own split is as it was, so that its evaluation rows are the ones that are left out.
    assert lab.step(graph.producer_name("dataset")).config["min_eval_prompts"] == 500


@pytest.mark.parametrize(("of_line", "of_lab"), [("null", 40), ("3", 3), ("500", 40)])
def test_a_lab_scores_the_base_on_few_rows(line: Path, root_uri: str, of_line: str, of_lab: int) -> None:
    line.write_text(line.read_text() + f"evaluate: {{base_rows: {of_line}, min_prompts: 1}}\n")
    plan = plans(line, root_uri)[0]
    assert plan.step("evaluate").config["base_rows"] == of_lab


def test_no_line_sets_what_only_a_lab_may(line: Path, root_uri: str) -> None:
    with pytest.raises(UsageError, match="only qlora-retrain lab sets it"):
        make_plan.make_plan(line, root_uri, overrides=["data.judge_fraction=0.1"])


def test_what_a_lab_has_trained_is_never_published(
    line: Path, root_uri: str, small_steps: dict[str, Callable[..., object]], run_all: Callable[[Plan], dict[str, int]]
) -> None:
    lab = plans(line, root_uri)[0]
    codes = run_all(lab)
    assert list(codes.values()) == [0] * 5 + [12]
    assert files(root_uri, "models") == set()
    # Nor where somebody makes the key of a publisher for it.
    key_admin.create(open_store(root_uri), [lab.line])
    ending = execute.run_step(lab, graph.producer_name("release"), lambda: small_steps["publish"])  # type: ignore[arg-type, return-value]
    assert "its model was judged by training rows" in ending.reason


def test_a_long_name_of_a_line_stays_a_name() -> None:
    assert lab_line("a" * 63) == "a" * 59 + "-lab"
    assert lab_line("intents") == "intents-lab"
    assert lab_line("a" * 58 + "-bcde") == "a" * 58 + "-lab"


def test_a_report_that_cannot_have_its_folder_is_refused(line: Path, root_uri: str) -> None:
    with pytest.raises(UsageError, match=r"--out .*intents.yaml: cannot be made \(File exists\); name a folder"):
        experiment.run(LabOptions(line, root_uri, (), out=line))
