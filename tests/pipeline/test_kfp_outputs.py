"""What an orchestrator's UI is given of a step and of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.core.errors import DataRefused
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, kfp_outputs, run_page, status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage.store import Store

RunAll = Callable[[Plan], dict[str, int]]


def executor_input(folder: Path) -> str:
    """KFP's message, as far as it counts here."""
    numbers = {"artifacts": [{"name": "numbers", "uri": str(folder / "numbers")}]}
    return json.dumps({"outputs": {"artifacts": {"numbers": numbers}, "outputFile": str(folder / "new" / "out.json")}})


def test_a_steps_report_and_its_finite_numbers_are_copied(made_plan: Plan, run_all: RunAll, tmp_path: Path) -> None:
    assert set(run_all(made_plan).values()) == {0}
    kfp_outputs.copy(
        made_plan, "train_qlora", report_to=tmp_path / "ui" / "report", executor_input=executor_input(tmp_path)
    )
    assert (tmp_path / "ui" / "report").read_text() == '"training"\n'
    outputs = json.loads((tmp_path / "new" / "out.json").read_text())
    (output,) = outputs["artifacts"]["numbers"]["artifacts"]
    assert output["uri"] == str(tmp_path / "numbers")
    assert output["metadata"]["steps"] == 3
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in output["metadata"].values())


def test_numbers_that_kfp_cannot_hold_are_left_out() -> None:
    numbers = {"loss": 0.5, "steps": 3, "verdict": "pass", "moved": True, "bad": math.nan, "huge": math.inf, "no": None}
    outputs = kfp_outputs.metrics({"numbers": {"artifacts": [{"name": "numbers", "uri": "x"}]}}, numbers)
    assert outputs["artifacts"]["numbers"]["artifacts"][0]["metadata"] == {"loss": 0.5, "steps": 3}


def test_a_report_that_cannot_be_handed_over_fails_nothing(
    made_plan: Plan, run_all: RunAll, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all(made_plan)
    (tmp_path / "file").write_text("")
    kfp_outputs.copy(made_plan, "train_qlora", report_to=tmp_path / "file" / "report", executor_input="{}")
    assert "train_qlora: its report could not be copied" in capsys.readouterr().out


def test_a_run_that_published_says_what(made_plan: Plan, run_all: RunAll) -> None:
    run_all(made_plan)
    version = status.numbers(made_plan, "publish")["version"]
    assert run_page.sentence(made_plan) == f"Published {version}, promoted to production."
    assert str(version) in run_page.page(made_plan)
    assert run_page.decisive_page(made_plan) == '"evaluation"\n', "the verdict's report"


def test_a_refused_run_says_why_and_its_report_is_the_refusals(
    made_plan: Plan, small_steps: dict[str, Callable[..., StepResult]], store: Store
) -> None:
    def refuses(
        config: object,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> StepResult:
        (dataset / "report.html").write_text("too many <bad> rows")
        return StepResult({"rows": 3}, refused=DataRefused("half of the rows are <bad>"))

    assert execute.run_step(made_plan, "validate_data", lambda: refuses).code == 10
    assert run_page.sentence(made_plan) == "validate_data: data refused (10): half of the rows are <bad>"
    page = run_page.page(made_plan)
    assert "half of the rows are &lt;bad&gt;" in page
    assert "<bad>" not in page
    assert run_page.decisive_page(made_plan) == "too many <bad> rows"
    # A step further on that reads it says so, whatever else it lacks.
    assert execute.run_step(made_plan, "publish", lambda: small_steps["publish"]).code == 10


def test_a_run_under_way_names_the_first_step_that_has_made_nothing(made_plan: Plan) -> None:
    assert run_page.sentence(made_plan).startswith("Not finished: validate_data has no artifact yet")


def test_a_report_that_is_not_as_promised_is_not_shown(
    made_plan: Plan, run_all: RunAll, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all(made_plan)
    manifest = status.find_manifest(made_plan, "train_qlora")
    assert manifest is not None
    (tmp_path / "report.html").write_text("a lie")
    store.delete([f"{manifest.prefix}/report.html"])
    store.upload(tmp_path, manifest.prefix, ["report.html"])
    kfp_outputs.copy(made_plan, "train_qlora", report_to=tmp_path / "shown", executor_input=None)
    assert not (tmp_path / "shown").exists()
    assert "report.html: its sha256 differs" in capsys.readouterr().out
