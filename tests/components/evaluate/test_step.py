"""The evaluation step on a real tiny model in 4 bits with a trained adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.evaluate.step import run
from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.errors import Exit, UsageError
from qlora_retrain.scoring import read_scores

CONFIG = EvaluateConfig(first_release=True, bootstrap_samples=200, device="cpu", batch_tokens=2048)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    return folder


@pytest.fixture
def inputs(tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path) -> dict[str, Path]:
    return {"base_model": tiny_model, "base_nf4": tiny_nf4, "adapter": tiny_adapter}


def document(evaluation: Path) -> Any:
    return json.loads((evaluation / "evaluation.json").read_text())


def test_evaluate_passes_a_first_release_that_learned_its_labels(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    dataset = write_dataset(tmp_path / "dataset", golden=12)
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "general.txt").write_text("The sun rises\nin the east.\n\nWater is wet.\n\n\nBirds can fly.\n")
    (reference / "more.jsonl").write_text('{"text": "Snow is cold."}\n')
    report = run(CONFIG, dataset, **inputs, champion=None, anchor=None, golden_data=None, reference_data=reference,
                 evaluation=evaluation)  # fmt: skip
    assert report.refused is None
    assert report.numbers["verdict"] == "pass"
    assert report.numbers["rows"] == 36
    found = document(evaluation)
    assert set(found["contestants"]) == {"base", "base_nf4", "challenger"}
    assert found["metric"] == "accuracy"
    assert set(found["golden"]) == set(found["reference"]) == set(found["contestants"])
    assert EvaluateConfig.model_validate(found["settings"]) == CONFIG
    assert [rule["passed"] for rule in found["rules"]] == [True] * len(found["rules"])
    names = ["enough_rows", "gain_over_base", "loss_to_champion", "golden", "slices"]
    assert [rule["name"] for rule in found["rules"]] == names
    scores = read_scores(evaluation / "scores.jsonl")
    rows = [s for s in scores["challenger"] if s.suite == "eval"]
    assert found["contestants"]["challenger"]["accuracy"] == pytest.approx(sum(bool(s.correct) for s in rows) / 36)
    assert report.numbers["loss_challenger"] == pytest.approx(
        sum(s.loss_nats for s in rows) / sum(s.tokens for s in rows)
    )
    assert {len(s) for s in scores.values()} == {36 + 12 + 4}


def test_the_4_bit_base_is_scored_with_the_adapter_off(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    from qlora_retrain import chat, modeling, scoring

    dataset = write_dataset(tmp_path / "dataset")
    run(
        CONFIG,
        dataset,
        **inputs,
        champion=None,
        anchor=None,
        golden_data=None,
        reference_data=None,
        evaluation=evaluation,
    )
    rows = scoring.read_rows(dataset / "eval.jsonl", "eval")
    alone = scoring.score_rows(
        modeling.load_nf4(inputs["base_nf4"], dtype="float32"),
        chat.load_tokenizer(inputs["base_nf4"]),
        rows,
        labels=["delivery", "login", "refund"],
        batch_tokens=2048,
        what="scoring",
    )
    scores = read_scores(evaluation / "scores.jsonl")
    assert [s.loss_nats for s in scores["base_nf4"]] == pytest.approx([s.loss_nats for s in alone], rel=1e-5)
    assert sum(s.loss_nats for s in scores["challenger"]) < sum(s.loss_nats for s in scores["base_nf4"])


def test_packed_4_bit_weights_with_an_adapter_score_labels_as_alone(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    from qlora_retrain import chat, modeling, scoring

    labels = ["delivery", "login", "refund"]
    rows = scoring.read_rows(write_dataset(tmp_path / "dataset", rows=4) / "eval.jsonl", "eval")
    model = modeling.attach(modeling.load_nf4(inputs["base_nf4"], dtype="bfloat16"), inputs["adapter"])
    tokenizer = chat.load_tokenizer(inputs["base_nf4"])
    scores = scoring.score_rows(model, tokenizer, rows, labels=labels, batch_tokens=2048, what="scoring")
    for row, score in zip(rows, scores, strict=True):
        prompt = chat.prompt_ids(tokenizer, row.messages[:1])
        answer = chat.answer_ids(tokenizer, row.messages[:1], row.messages[1]["content"])
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
        expected = -logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum()
        assert score.loss_nats == pytest.approx(float(expected), rel=0.01)  # all in bf16


def test_a_text_task_is_judged_by_loss_and_has_no_accuracy(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    dataset = write_dataset(tmp_path / "dataset", task="text")
    report = run(CONFIG, dataset, **inputs, champion=None, anchor=None, golden_data=None, reference_data=None,
                 evaluation=evaluation)  # fmt: skip
    assert report.refused is None
    assert document(evaluation)["metric"] == "loss"
    assert "accuracy" not in document(evaluation)["contestants"]["challenger"]
    assert not [name for name in report.numbers if name.startswith("accuracy")]


def test_a_champion_is_scored_too_and_its_absence_is_insufficient_evidence(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    dataset = write_dataset(tmp_path / "dataset", task="text")
    later = CONFIG.model_copy(update={"first_release": False})
    report = run(later, dataset, **inputs, champion=None, anchor=None, golden_data=None, reference_data=None,
                 evaluation=evaluation)  # fmt: skip
    assert report.refused is not None
    assert report.refused.exit_code == Exit.QUALITY_REFUSED
    assert "set evaluate.first_release: true" in str(report.refused)
    assert (evaluation / "report.html").is_file()
    # The base model itself is the weakest champion that there can be. Its data was never profiled: no drift to judge.
    (tmp_path / "version").mkdir()
    (tmp_path / "version" / "model").symlink_to(inputs["base_model"])
    later = later.model_copy(update={"max_drift": None})
    report = run(later, dataset, **inputs, champion=tmp_path / "version", anchor=None, golden_data=None,
                 reference_data=None, evaluation=evaluation)  # fmt: skip
    assert report.refused is None
    assert report.numbers["loss_champion"] == pytest.approx(report.numbers["loss_base"])


def test_the_page_names_labels_but_shows_no_row(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    dataset = write_dataset(tmp_path / "dataset")
    strict = CONFIG.model_copy(update={"min_gain_over_base": 2.0})
    report = run(strict, dataset, **inputs, champion=None, anchor=None, golden_data=None, reference_data=None,
                 evaluation=evaluation)  # fmt: skip
    assert report.refused is not None
    html = (evaluation / "report.html").read_text()
    assert "Evaluation: refuse" in html
    assert "delivery" in html
    assert "order number" not in html + (evaluation / "scores.jsonl").read_text()


def test_reference_data_without_a_passage_is_an_error_that_says_so(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "LICENSE").write_text("nothing")
    dataset = write_dataset(tmp_path / "dataset")
    with pytest.raises(UsageError, match="no passage found"):
        run(CONFIG, dataset, **inputs, champion=None, anchor=None, golden_data=None, reference_data=reference,
            evaluation=evaluation)  # fmt: skip
