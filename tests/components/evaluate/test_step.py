"""Run the evaluation step on a real tiny model in 4 bits with a trained adapter."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.evaluate.step import run
from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core.errors import Exit, UsageError
from qlora_retrain.evaluation.scoring import read_scores

CONFIG = EvaluateConfig(allow_first_release=True, bootstrap_samples=200, device="cpu", batch_tokens=2048)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    return folder


@pytest.fixture
def inputs(tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path) -> dict[str, Path]:
    return {"base_model": tiny_model, "base_nf4": tiny_nf4, "adapter": tiny_adapter}


def read_document(evaluation: Path) -> Any:
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

    document = read_document(evaluation)
    assert set(document["contestants"]) == {"base", "base_nf4", "challenger"}
    assert document["metric"] == "accuracy"
    assert set(document["golden"]) == set(document["reference"]) == set(document["contestants"])
    assert EvaluateConfig.model_validate(document["settings"]) == CONFIG
    assert [rule["passed"] for rule in document["rules"]] == [True] * len(document["rules"])
    names = ["enough_prompts", "gain_over_base", "loss_to_champion", "answers_end", "golden", "forgetting", "slices"]
    assert [rule["name"] for rule in document["rules"]] == names

    # The metrics of the document are those of the scores.
    scores = read_scores(evaluation / "scores.jsonl")
    rows = [s for s in scores["challenger"] if s.suite == "eval"]
    assert document["contestants"]["challenger"]["accuracy"] == pytest.approx(sum(bool(s.correct) for s in rows) / 36)
    assert report.numbers["loss_challenger"] == pytest.approx(
        sum(s.loss_nats for s in rows) / sum(s.tokens for s in rows)
    )
    assert {len(s) for s in scores.values()} == {36 + 12 + 4}


def test_the_base_may_be_scored_on_some_rows(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    dataset = write_dataset(tmp_path / "dataset", golden=12)
    config = CONFIG.model_copy(update={"base_rows": 31})
    report = run(config, dataset, **inputs, champion=None, anchor=None, golden_data=None, reference_data=None,
                 evaluation=evaluation)  # fmt: skip
    assert report.refused is None
    counts = {name: values["rows"] for name, values in read_document(evaluation)["contestants"].items()}
    assert counts == {"base": 31, "base_nf4": 31, "challenger": 36}
    scores = read_scores(evaluation / "scores.jsonl")
    assert [s.id for s in scores["base"]] == [s.id for s in scores["challenger"]]
    scored = {s.id for s in scores["base"] if s.suite == "eval" and s.tokens}
    assert scored == {s.id for s in scores["base_nf4"] if s.suite == "eval" and s.tokens}
    assert "None" not in (evaluation / "report.html").read_text()


def test_the_4_bit_base_is_scored_with_the_adapter_off(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    from qlora_retrain.evaluation import scoring
    from qlora_retrain.lm import chat, loading

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

    # The 4-bit base without any adapter must give the same losses.
    rows = scoring.read_rows(dataset / "eval.jsonl", "eval")
    alone = scoring.score_rows(
        loading.load_nf4(inputs["base_nf4"], dtype="float32"),
        chat.load_tokenizer(inputs["base_nf4"]),
        rows,
        labels=["delivery", "login", "refund"],
        batch_tokens=2048,
        description="scoring",
    )
    scores = read_scores(evaluation / "scores.jsonl")
    assert [s.loss_nats for s in scores["base_nf4"]] == pytest.approx([s.loss_nats for s in alone], rel=1e-5)
    assert sum(s.loss_nats for s in scores["challenger"]) < sum(s.loss_nats for s in scores["base_nf4"])


def test_packed_4_bit_weights_with_an_adapter_give_each_label_its_own_score(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    from qlora_retrain.evaluation import scoring
    from qlora_retrain.lm import chat, loading

    labels = ["delivery", "login", "refund"]
    rows = scoring.read_rows(write_dataset(tmp_path / "dataset", rows=4) / "eval.jsonl", "eval")
    model = loading.attach_adapter(loading.load_nf4(inputs["base_nf4"], dtype="bfloat16"), inputs["adapter"])
    tokenizer = chat.load_tokenizer(inputs["base_nf4"])
    scores = scoring.score_rows(model, tokenizer, rows, labels=labels, batch_tokens=2048, description="scoring")
    for row, score in zip(rows, scores, strict=True):
        prompt = tokenizer.prompt_ids(row.messages[:1])
        answer = tokenizer.answer_ids(row.messages[:1], row.messages[1]["content"])
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
        expected = -logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum()
        assert score.loss_nats == pytest.approx(float(expected), rel=0.01)  # all in bf16


def test_a_text_task_is_compared_by_loss_and_has_no_accuracy(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    dataset = write_dataset(tmp_path / "dataset", task="text")
    report = run(CONFIG, dataset, **inputs, champion=None, anchor=None, golden_data=None, reference_data=None,
                 evaluation=evaluation)  # fmt: skip
    assert report.refused is None
    assert read_document(evaluation)["metric"] == "loss"
    assert "accuracy" not in read_document(evaluation)["contestants"]["challenger"]
    assert not [name for name in report.numbers if name.startswith("accuracy")]


def test_a_champion_is_scored_too_and_its_absence_is_insufficient_evidence(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    dataset = write_dataset(tmp_path / "dataset", task="text")
    not_first = CONFIG.model_copy(update={"allow_first_release": False})
    report = run(not_first, dataset, **inputs, champion=None, anchor=None, golden_data=None, reference_data=None,
                 evaluation=evaluation)  # fmt: skip
    assert report.refused is not None
    assert report.refused.exit_code == Exit.QUALITY_REFUSED
    assert "set evaluate.allow_first_release: true" in str(report.refused)
    assert (evaluation / "report.html").is_file()

    # The base model itself is the weakest champion that there can be. Its data has no profile, so drift is not checked.
    (tmp_path / "version").mkdir()
    (tmp_path / "version" / "model").symlink_to(inputs["base_model"])
    not_first = not_first.model_copy(update={"max_drift_psi": None})
    report = run(not_first, dataset, **inputs, champion=tmp_path / "version", anchor=None, golden_data=None,
                 reference_data=None, evaluation=evaluation)  # fmt: skip
    assert report.refused is None
    assert report.numbers["loss_champion"] == pytest.approx(report.numbers["loss_base"])


def test_the_report_names_labels_but_shows_no_row(
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


def test_an_empty_evaluation_set_is_insufficient_evidence(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    dataset = write_dataset(tmp_path / "dataset", rows=0, golden=12)
    report = run(CONFIG, dataset, **inputs, champion=None, anchor=None, golden_data=None, reference_data=None,
                 evaluation=evaluation)  # fmt: skip
    assert report.refused is not None
    assert report.refused.exit_code == Exit.QUALITY_REFUSED
    assert read_document(evaluation)["verdict"] == "insufficient evidence"
    assert "0 evaluation rows of 0 different prompts; at least 30 different prompts are needed" in str(report.refused)
    assert (evaluation / "report.html").is_file()


def write_profile(folder: Path, labels: dict[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.json").write_text(json.dumps({"distributions": {"label": labels}}))


@pytest.mark.parametrize(("before", "passed"), [((100, 100, 100), True), ((280, 10, 10), False), (None, None)])
def test_data_that_drifted_from_the_champions_is_refused(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path,
    before: tuple[int, ...] | None, passed: bool | None,
) -> None:  # fmt: skip
    dataset, version = write_dataset(tmp_path / "dataset"), tmp_path / "version"
    write_profile(dataset, {"delivery": 90, "login": 110, "refund": 100})
    version.mkdir()
    (version / "model").symlink_to(inputs["base_model"])
    if before:
        write_profile(version / "data", dict(zip(["delivery", "login", "refund"], before, strict=True)))
    run(CONFIG, dataset, **inputs, champion=version, anchor=None, golden_data=None, reference_data=None,
        evaluation=evaluation)  # fmt: skip
    rule = next(r for r in read_document(evaluation)["rules"] if r["name"] == "data_drift")
    assert rule["passed"] is passed
    assert (
        read_document(evaluation)["verdict"] == {True: "pass", False: "refuse", None: "insufficient evidence"}[passed]
    )


def test_the_anchor_is_a_contestant_on_the_same_rows(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    dataset, version = write_dataset(tmp_path / "dataset"), tmp_path / "version"
    version.mkdir()
    (version / "model").symlink_to(inputs["base_model"])
    settings = CONFIG.model_copy(update={"max_drift_psi": None})
    report = run(settings, dataset, **inputs, champion=version, anchor=version, golden_data=None, reference_data=None,
                 evaluation=evaluation)  # fmt: skip
    assert report.refused is None
    scores = read_scores(evaluation / "scores.jsonl")
    assert list(scores) == ["base", "base_nf4", "challenger", "champion", "anchor"]
    assert [s.id for s in scores["anchor"]] == [s.id for s in scores["challenger"]]
    assert "loss_to_anchor" in [r["name"] for r in read_document(evaluation)["rules"]]


def test_overfitting_forgetting_and_intruders_are_in_the_document(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    dataset, reference = write_dataset(tmp_path / "dataset"), tmp_path / "reference"
    rows = (dataset / "eval.jsonl").read_text().splitlines()
    (dataset / "train.jsonl").write_text("\n".join(rows[:7]) + "\n")
    reference.mkdir()
    passages = (
        "The sun rises in the east.",
        "Water is wet.",
        "Birds can fly.",
        "Ice is cold.",
        "Grass is green.",
        "Stones sink.",
        *(f"There are {n} apples in the basket." for n in range(2, 14)),
    )
    (reference / "general.txt").write_text("\n\n".join(passages))

    # Limits that almost any model exceeds, so that each rule has a result to compare.
    settings = CONFIG.model_copy(
        update={"train_rows": 5, "max_train_eval_gap_nats": 1e-9, "max_forgetting_accuracy": 0.001}
    )
    run(settings, dataset, **inputs, champion=None, anchor=None, golden_data=None, reference_data=reference,
        evaluation=evaluation)  # fmt: skip

    document = read_document(evaluation)

    # The training rows are evaluation rows here, so their scores are known.
    by_id = {s.id: s for s in read_scores(evaluation / "scores.jsonl")["challenger"]}
    trained = sorted(json.loads(row)["id"] for row in rows[:7])[:5]
    loss = sum(by_id[i].loss_nats for i in trained) / sum(by_id[i].tokens for i in trained)
    assert document["train_eval_gap"]["train_loss"] == pytest.approx(loss, rel=1e-3)
    gap = document["contestants"]["challenger"]["loss"] - loss
    assert document["train_eval_gap"]["gap"] == pytest.approx(gap, abs=1e-4)

    rules = {rule["name"]: rule for rule in document["rules"]}
    assert rules["train_eval_gap"]["passed"] is (document["train_eval_gap"]["gap"] <= 1e-9)
    # What is evaluated is not what ships, so this is reported and refuses nothing.
    forgetting = rules["forgetting_accuracy_unmerged"]
    assert forgetting["passed"] is True
    assert forgetting["high"] > 0.001
    assert "the form that ships is judged by the limit of 0.001" in forgetting["text"]
    reference_numbers = document["reference"]
    lost = reference_numbers["base"]["token_accuracy"] - reference_numbers["challenger"]["token_accuracy"]
    assert forgetting["value"] == pytest.approx(lost)

    # Two blocks of seven adapted matrices.
    assert len(document["intruder_dimensions"]) == 14
    assert {s["name"] for s in document["slices"]} >= {"label=refund", "language=latin"}
    assert {d["against"] for d in document["differences"]} == {"base", "base_nf4"}


def test_golden_completions_are_in_the_report_only_where_the_line_allows_text(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path, evaluation: Path
) -> None:
    dataset = write_dataset(tmp_path / "dataset", golden=12)
    golden = [json.loads(line) for line in (dataset / "golden.jsonl").read_text().splitlines()]
    # Row text in a published page must not become markup.
    golden[0]["messages"][0]["content"] = "<script>alert(1)</script> my money back"
    (dataset / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in golden))
    settings = CONFIG.model_copy(update={"max_new_tokens": 6})
    for allowed in (False, True):
        run(settings.model_copy(update={"text_in_reports": allowed}), dataset, **inputs, champion=None, anchor=None,
            golden_data=None, reference_data=None, evaluation=evaluation)  # fmt: skip
        html = (evaluation / "report.html").read_text()
        assert ("Completions of the golden rows" in html) is allowed
        assert (golden[1]["messages"][0]["content"] in html) is allowed
        assert ("&lt;script&gt;alert(1)" in html) is allowed
        assert "<script" not in html
        other_files = (evaluation / "scores.jsonl").read_text() + (evaluation / "evaluation.json").read_text()
        assert "money back" not in other_files


@pytest.mark.parametrize(
    ("trained", "sentence"),
    [
        (14, None),
        (4, "4 of the adapter's 14 steps were trained by the attempt that made it, the others are checkpoint-10's"),
        (0, "0 of the adapter's 14 steps were trained by the attempt that made it, the others are checkpoint-14's"),
    ],
)
def test_the_verdict_says_how_much_of_the_adapter_its_attempt_trained(
    inputs: dict[str, Path],
    write_dataset: Callable[..., Path],
    tmp_path: Path,
    evaluation: Path,
    trained: int,
    sentence: str | None,
) -> None:
    """A run that was resumed at its last step took its adapter from a checkpoint, which somebody may have forged."""
    adapter = tmp_path / "adapter"
    shutil.copytree(inputs["adapter"], adapter)
    training = {"steps": 14, "resumed_at": 14 - trained, "trained_steps": trained}
    (adapter / "training.json").write_text(json.dumps(training))
    report = run(CONFIG, write_dataset(tmp_path / "dataset"), **{**inputs, "adapter": adapter}, champion=None,
                 anchor=None, golden_data=None, reference_data=None, evaluation=evaluation)  # fmt: skip

    # It refuses nothing: a run may well be stopped after its last step.
    document = read_document(evaluation)
    assert report.refused is None
    assert {name: report.numbers[name] for name in training} == training
    assert document["training"] == training
    rules = [rule for rule in document["rules"] if rule["name"] == "trained_steps"]
    assert [(rule["text"], rule["value"], rule["limit"]) for rule in rules] == (
        [(sentence, trained, 14)] if sentence else []
    )
    # Where no step was trained, the sentence that a person reads first says so too.
    assert (str(sentence) in document["sentence"]) is (trained == 0)
    assert (str(sentence) in html.unescape((evaluation / "report.html").read_text())) is bool(sentence)
