"""A run's summary has the version, the verdict, and the numbers that matter with their intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.pipeline import run_summary
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, open_store
from qlora_retrain.storage.artifact import Manifest

EVALUATION: dict[str, Any] = {
    "verdict": "pass",
    "metric": "accuracy",
    "contestants": {"challenger": {"accuracy": 0.9131, "accuracy_low": 0.8932, "accuracy_high": 0.9305}},
    "differences": [
        {"suite": "eval", "against": "base", "value": 0.5, "low": 0.4, "high": 0.6},
        {"suite": "golden", "against": "champion", "value": 0.1, "low": 0.0, "high": 0.2},
        {"suite": "eval", "against": "champion", "value": -0.01, "low": -0.02, "high": 0.005},
    ],
}


def complete(plan: Plan, folder: Path, step: str, files: dict[str, str], **numbers: Any) -> Manifest:
    folder = folder / step
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    planned = plan.step(step)
    manifest = Manifest(
        artifact="evaluation" if step == "evaluate" else "release", key=planned.key, step=step, attempt="a1",
        numbers=numbers, reason=None, outcome="done", exit_code=0, files=artifact.list_files(folder),
        inputs=planned.inputs, config=planned.identity, code=planned.code, provenance={},
    )  # fmt: skip
    artifact.complete(open_store(plan.root), folder, manifest, line=plan.line)
    return manifest


def evaluated(plan: Plan, folder: Path, **changes: Any) -> Manifest:
    return complete(plan, folder, "evaluate", {"evaluation.json": json.dumps({**EVALUATION, **changes})})


def test_the_verdict_has_the_metric_and_the_difference_to_the_champion(made_plan: Plan, tmp_path: Path) -> None:
    assert run_summary.verdict_line(made_plan) == ""
    evaluated(made_plan, tmp_path)
    assert run_summary.verdict_line(made_plan) == (
        "Verdict: pass; accuracy 0.9131 (0.8932 to 0.9305); "
        "against the champion -0.0100 (-0.0200 to +0.0050), where above 0 is better."
    )
    assert run_summary.as_text(made_plan).splitlines()[0].startswith("Not finished: ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"differences": EVALUATION["differences"][:2]},
            "Verdict: pass; accuracy 0.9131 (0.8932 to 0.9305); "
            "against the base +0.5000 (+0.4000 to +0.6000), where above 0 is better.",
        ),
        ({"contestants": {}, "differences": [], "verdict": "insufficient evidence"}, "Verdict: insufficient evidence."),
        (
            {"metric": "loss", "contestants": {"challenger": {"loss": 0.5, "loss_low": None}}, "differences": []},
            "Verdict: pass; nats per token 0.5000.",
        ),
    ],
)
def test_what_was_not_measured_is_left_out(
    made_plan: Plan, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    evaluated(made_plan, tmp_path, **changes)
    assert run_summary.verdict_line(made_plan) == expected


def test_numbers_that_were_changed_in_the_store_are_refused(made_plan: Plan, tmp_path: Path) -> None:
    manifest = evaluated(made_plan, tmp_path)
    path = Path(made_plan.root.removeprefix("file://")) / manifest.prefix / "evaluation.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("0.9131", "0.9999"))
    with pytest.raises(IntegrityError, match=r"evaluation\.json"):
        run_summary.verdict_line(made_plan)
