"""The merge step after a real evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from components.evaluate.step import run as evaluate
from components.merge_adapter.step import run
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.errors import Exit, IntegrityError
from qlora_retrain.scoring import read_scores, write_scores

CONFIG = MergeConfig(device="cpu")
RULES = EvaluateConfig(first_release=True, bootstrap_samples=200, device="cpu", max_forgetting_nats=100.0)


@pytest.fixture
def inputs(
    tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path, write_dataset: Callable[..., Path], tmp_path: Path
) -> dict[str, Path]:
    folders = {"base_model": tiny_model, "base_nf4": tiny_nf4, "adapter": tiny_adapter}
    dataset, evaluation, reference = write_dataset(tmp_path / "dataset", golden=12), tmp_path / "eva", tmp_path / "ref"
    evaluation.mkdir()
    reference.mkdir()
    (reference / "general.txt").write_text("The sun rises in the east.\n\nBirds can fly.\n")
    evaluate(RULES, dataset, **folders, champion=None, anchor=None, golden_data=None, reference_data=reference,
             evaluation=evaluation)  # fmt: skip
    (tmp_path / "model").mkdir()
    return {"dataset": dataset, **folders, "evaluation": evaluation, "model": tmp_path / "model"}


def test_the_merged_form_is_certified_by_the_rules_of_the_evaluation(inputs: dict[str, Path]) -> None:
    report = run(CONFIG, **inputs)
    assert report.refused is None
    certificate = json.loads((inputs["model"] / "certificate.json").read_text())
    names = [rule["name"] for rule in certificate["rules"]]
    assert names[:5] == ["enough_rows", "gain_over_base", "loss_to_champion", "golden", "forgetting"]
    assert names[5:] == ["slices", "merge_cost"]
    assert certificate["verdict"] == "pass"
    forms = certificate["forms"]
    assert certificate["merge_loss_nats"]["value"] == pytest.approx(forms["merged"]["loss"] - forms["live"]["loss"])
    assert abs(certificate["merge_loss_nats"]["value"]) < 0.02  # only the rounding of the sum to bf16
    assert report.numbers["merge_loss_nats"] == certificate["merge_loss_nats"]["value"]
    assert "order number" not in (inputs["model"] / "report.html").read_text()


def test_a_merge_that_costs_too_much_is_refused_with_its_certificate(inputs: dict[str, Path]) -> None:
    path = inputs["evaluation"] / "scores.jsonl"
    scores = read_scores(path)
    # A live model of half the loss, so that this merge is the worse one.
    scores["challenger"] = [replace(score, loss_nats=score.loss_nats / 2) for score in scores["challenger"]]
    write_scores(path, scores)
    report = run(CONFIG, **inputs)
    assert report.refused is not None
    assert report.refused.exit_code == Exit.QUALITY_REFUSED
    assert "lost by merging" in str(report.refused)
    certificate = json.loads((inputs["model"] / "certificate.json").read_text())
    assert certificate["verdict"] == "refuse"
    assert certificate["merge_loss_nats"]["high"] > CONFIG.max_loss_nats
    assert (inputs["model"] / "report.html").is_file()


def test_an_evaluation_of_another_data_set_is_refused(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    other = write_dataset(tmp_path / "other", rows=33, golden=12)
    with pytest.raises(IntegrityError, match="made from another one"):
        run(CONFIG, **{**inputs, "dataset": other})
