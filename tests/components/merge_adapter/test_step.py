"""The merge step after a real evaluation."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from components.merge_adapter.evaluation_inputs import EvaluationInputs
from components.merge_adapter.merge import merge
from components.merge_adapter.step import run
from qlora_retrain.config.sections import MergeConfig
from qlora_retrain.core.errors import Exit, IntegrityError
from qlora_retrain.evaluation import scoring
from qlora_retrain.evaluation.scoring import read_scores, write_scores
from qlora_retrain.lm import chat, loading

# The interval of a cost on 18 rows of a tiny model is wide, so its upper end may lie above the default limit by chance.
CONFIG = MergeConfig(device="cpu", min_prompts=18, max_loss_increase_nats=0.2)


def certificate(inputs: dict[str, Path]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((inputs["model"] / "certificate.json").read_text())
    return document


def test_the_merged_form_is_certified_by_the_rules_of_the_evaluation(inputs: dict[str, Path]) -> None:
    report = run(CONFIG, **inputs)
    assert report.refused is None
    document = certificate(inputs)
    names = [rule["name"] for rule in document["rules"]]
    expected = [
        "enough_prompts",
        "gain_over_base",
        "loss_to_champion",
        "answers_end",
        "golden",
        "forgetting",
        "slices",
        "merge_prompts",
        "merge_cost",
    ]
    assert names == expected
    assert document["verdict"] == "pass"

    # The cost of merging is the difference of two losses that the certificate states as well.
    forms = document["forms"]["certification"]
    cost = document["merge_loss_nats"]["value"]
    assert cost == pytest.approx(forms[document["base"]]["loss"] - forms["live"]["loss"])
    assert abs(forms["dequantized"]["loss"] - forms["live"]["loss"]) < 0.02  # only the rounding of the sum to bf16
    assert report.numbers["merge_loss_nats"] == cost
    assert "order number" not in (inputs["model"] / "report.html").read_text()


def test_the_better_candidate_on_one_half_is_what_ships_and_the_other_half_certifies_it(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    run(CONFIG, **inputs)
    document = certificate(inputs)
    assert document["rows"] == {"selection": 18, "certification": 18}

    # Both candidates are merged and scored again, and their losses summed by half here.
    losses: dict[str, dict[bool, float]] = {}
    rows = scoring.read_rows(inputs["dataset"] / "eval.jsonl", "eval")
    rows_by_id = {row.id: row for row in rows}
    for name in ("original", "dequantized"):
        folder = tmp_path / name
        folder.mkdir()
        merge(inputs["base_model"], inputs["base_nf4"], inputs["adapter"], folder,
              dequantized=name == "dequantized", max_shard_gib=5.0)  # fmt: skip
        model, tokenizer = loading.load_base(folder, dtype="float32"), chat.load_tokenizer(folder)
        labels = json.loads((inputs["dataset"] / "dataset.json").read_text())["labels"]
        scores = scoring.score_rows(model, tokenizer, rows, labels=labels, batch_tokens=4096, description="x")
        selection = set(sorted(rows_by_id, key=lambda i: hashlib.sha256(f"merge:{i}".encode()).digest())[:18])
        losses[name] = {
            half: sum(s.loss_nats for s in scores if (s.id in selection) == half)
            / sum(s.tokens for s in scores if (s.id in selection) == half)
            for half in (True, False)
        }
        assert document["forms"]["selection"][name]["loss"] == pytest.approx(losses[name][True], rel=1e-5)
        assert document["forms"]["certification"][name]["loss"] == pytest.approx(losses[name][False], rel=1e-5)

    # The winner on the selecting half ships, byte by byte.
    assert document["base"] == min(losses, key=lambda name: losses[name][True])
    shipped = (inputs["model"] / "model.safetensors").read_bytes()
    assert shipped == (tmp_path / document["base"] / "model.safetensors").read_bytes()
    assert not [path for path in inputs["model"].iterdir() if path.is_dir()]  # nothing is left of the other one
    # With 16 passages no strength can be chosen, so no more is built than the two bases.
    assert [candidate["form"] for candidate in document["candidates"]] == ["dequantized", "original"]
    assert (document["rank"], document["strength"]) == (8, 1.0)


def test_the_form_that_ships_decides_which_version_is_the_best_and_not_the_unmerged_model(
    inputs: dict[str, Path],
) -> None:
    path = inputs["evaluation"] / "scores.jsonl"
    scores = read_scores(path)
    # The unmerged model is no better than the champion by its answers; the merged form, whose answers are right, is.
    scores["challenger"] = [replace(s, correct=False) if s.suite == "eval" else s for s in scores["challenger"]]
    scores["champion"] = scores["challenger"]
    write_scores(path, scores)
    assert run(MergeConfig(device="cpu", base="dequantized"), **inputs).numbers["best"] == "challenger"


def test_a_form_that_ships_like_the_champion_leaves_it_the_best(inputs: dict[str, Path]) -> None:
    path = inputs["evaluation"] / "scores.jsonl"
    scores = read_scores(path)
    scores["champion"] = scores["challenger"]
    write_scores(path, scores)

    # With the default margin 36 rows are too few to rule out a loss, even when all are answered alike.
    evaluation_json = inputs["evaluation"] / "evaluation.json"
    evaluation = json.loads(evaluation_json.read_text())
    evaluation["settings"]["max_loss_to_champion"] = 0.2  # 36 rows answered alike rule out no less than 0.096
    evaluation_json.write_text(json.dumps(evaluation))
    report = run(MergeConfig(device="cpu", base="dequantized"), **inputs)
    assert report.refused is None
    assert report.numbers["best"] == "champion"


def test_a_form_that_is_refused_is_never_the_best(inputs: dict[str, Path]) -> None:
    path = inputs["evaluation"] / "scores.jsonl"
    scores = read_scores(path)
    scores["champion"] = scores["challenger"]
    write_scores(path, scores)
    report = run(MergeConfig(device="cpu", base="dequantized"), **inputs)  # with the default margin of 0.02
    assert report.refused is not None
    assert "best" not in report.numbers


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_a_base_that_is_named_is_certified_on_every_row(inputs: dict[str, Path], base: str) -> None:
    # Nothing is selected, so no row needs to be kept apart.
    run(MergeConfig(device="cpu", base=base), **inputs)  # type: ignore[arg-type]
    document = certificate(inputs)
    assert document["base"] == base
    assert document["rows"] == {"selection": 0, "certification": 36}
    assert set(document["forms"]["certification"]) == {"live", base}
    assert document["forms"]["certification"][base]["rows"] == 36


def test_halves_that_are_too_small_are_insufficient_evidence(inputs: dict[str, Path]) -> None:
    # 36 evaluation rows make two halves of 18.
    report = run(CONFIG.model_copy(update={"base": "measured", "min_prompts": 19}), **inputs)
    assert report.refused is not None
    assert report.refused.exit_code == Exit.QUALITY_REFUSED
    assert (
        "rows of 18 different prompts select the form, those of 18 others certify it; at least 19 different prompts of "
        "each are needed (merge.min_prompts)" in str(report.refused)
    )
    assert certificate(inputs)["verdict"] == "insufficient evidence"


def test_too_few_rows_for_two_halves_certify_the_evaluated_base_with_all_of_them(inputs: dict[str, Path]) -> None:
    run(MergeConfig(device="cpu", min_prompts=19), **inputs)
    document = certificate(inputs)
    assert (document["base"], document["rows"]) == ("dequantized", {"selection": 0, "certification": 36})
    assert document["why"].startswith(
        "dequantized, which computes what was evaluated: evaluation rows of 36 different prompts are too few"
    )


def test_kl_and_agreement_are_gates_only_where_a_limit_is_set(inputs: dict[str, Path]) -> None:
    # No merge into the other base reaches the first limit, any reaches the second.
    report = run(MergeConfig(device="cpu", base="original", max_kl_nats=1e-9, min_agreement=0.5), **inputs)
    rules = {rule["name"]: rule for rule in certificate(inputs)["rules"]}
    form = certificate(inputs)["forms"]["certification"]["original"]
    assert rules["kl_to_live"]["passed"] is False
    assert rules["kl_to_live"]["value"] == form["kl"] > 1e-9
    assert rules["agreement"]["passed"] is True
    assert rules["agreement"]["value"] == form["agreement"] >= 0.5
    assert "KL from the unmerged model" in str(report.refused)


def test_what_the_merged_form_forgot_is_measured_on_the_merged_form(inputs: dict[str, Path]) -> None:
    run(MergeConfig(device="cpu", base="original"), **inputs)
    document = certificate(inputs)
    model, tokenizer = loading.load_base(inputs["model"], dtype="float32"), chat.load_tokenizer(inputs["model"])
    texts = (inputs["reference_data"] / "general.txt").read_text().split("\n\n")
    ours = scoring.score_passages(model, tokenizer, texts, batch_tokens=4096, max_tokens=64, description="x")

    # Forgetting is what a token of general text costs more than in the base model.
    base = [s for s in read_scores(inputs["evaluation"] / "scores.jsonl")["base"] if s.suite == "reference"]
    lost = sum(a.loss_nats - b.loss_nats for a, b in zip(ours, base, strict=True)) / sum(s.tokens for s in ours)
    rule = next(rule for rule in document["rules"] if rule["name"] == "forgetting")
    assert rule["value"] == pytest.approx(lost, rel=1e-4)
    assert document["reference"]["merged"]["loss"] != document["reference"]["live"]["loss"]


def plain_loss(inputs: dict[str, Path], dtype: str) -> float:
    """Return the unmerged model's loss per token of the evaluation rows, from the full logits of each row alone."""
    unmerged = loading.attach_adapter(loading.load_nf4(inputs["base_nf4"], dtype=dtype), inputs["adapter"])
    tokenizer, nats = chat.load_tokenizer(inputs["base_nf4"]), []
    for line in (inputs["dataset"] / "eval.jsonl").read_text().splitlines():
        (row,) = tokenizer.encode(json.loads(line)["messages"])
        with torch.no_grad():
            logits = unmerged(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].float()
        targets, is_target = torch.tensor(row.input_ids[1:]), torch.tensor(row.supervised[1:])
        nats += cross_entropy(logits[is_target], targets[is_target], reduction="none").tolist()
    return sum(nats) / len(nats)


def test_the_unmerged_model_is_scored_again_where_the_evaluation_computed_in_another_precision(
    inputs: dict[str, Path],
) -> None:
    evaluated = [s for s in read_scores(inputs["evaluation"] / "scores.jsonl")["challenger"] if s.suite == "eval"]
    in_fp32 = sum(s.loss_nats for s in evaluated) / sum(s.tokens for s in evaluated)
    run(MergeConfig(device="cpu", base="dequantized"), **inputs)
    assert certificate(inputs)["forms"]["certification"]["live"]["loss"] == pytest.approx(in_fp32, rel=1e-9)

    # The evaluation computed in fp32; a merge in bf16 must not compare with these scores.
    shutil.rmtree(inputs["model"])
    inputs["model"].mkdir()
    run(MergeConfig(device="cpu", base="dequantized", precision="bfloat16"), **inputs)
    unmerged = certificate(inputs)["forms"]["certification"]["live"]["loss"]
    in_bf16 = plain_loss(inputs, "bfloat16")
    assert in_fp32 == pytest.approx(plain_loss(inputs, "float32"), rel=1e-4)
    assert unmerged == pytest.approx(in_bf16, abs=abs(in_bf16 - in_fp32) / 4), "in bf16, as the merged form"


def test_reference_text_other_than_the_evaluations_is_refused(inputs: dict[str, Path]) -> None:
    with pytest.raises(IntegrityError, match="passages are not those of reference_data"):
        run(MergeConfig(device="cpu", base="original"), **{**inputs, "reference_data": None})  # type: ignore[arg-type]


def test_a_merge_that_costs_too_much_is_refused_with_its_certificate(inputs: dict[str, Path]) -> None:
    path = inputs["evaluation"] / "scores.jsonl"
    scores = read_scores(path)
    # An unmerged model of half the loss, so that this merge is the worse one.
    scores["challenger"] = [replace(score, loss_nats=score.loss_nats / 2) for score in scores["challenger"]]
    write_scores(path, scores)

    report = run(CONFIG, **inputs)
    assert report.refused is not None
    assert report.refused.exit_code == Exit.QUALITY_REFUSED
    assert "lost by merging" in str(report.refused)

    # The artifact is complete, so that a person can see why.
    document = certificate(inputs)
    assert document["verdict"] == "refuse"
    assert document["merge_loss_nats"]["high"] > CONFIG.max_loss_increase_nats
    assert (inputs["model"] / "report.html").is_file()


def test_scores_of_an_older_release_take_their_prompts_from_the_data_set(inputs: dict[str, Path]) -> None:
    folders = inputs["dataset"], inputs["evaluation"], inputs["reference_data"]
    expected = EvaluationInputs.from_folders(*folders).scores
    assert all(score.prompt_id for scores in expected.values() for score in scores if score.suite == "eval")
    path = inputs["evaluation"] / "scores.jsonl"
    assert read_scores(path) == expected
    scores = {name: [replace(score, prompt_id="") for score in rows] for name, rows in expected.items()}
    write_scores(path, scores)
    assert read_scores(path) == scores
    assert EvaluationInputs.from_folders(*folders).scores == expected


def test_an_evaluation_of_another_data_set_is_refused(
    inputs: dict[str, Path], write_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    other_dataset = write_dataset(tmp_path / "other", rows=33, golden=12)
    with pytest.raises(IntegrityError, match="made from another data set"):
        run(CONFIG, **{**inputs, "dataset": other_dataset})


@pytest.mark.slow
def test_plain_transformers_in_a_fresh_process_finds_the_certified_loss(inputs: dict[str, Path]) -> None:
    run(MergeConfig(device="cpu", base="dequantized"), **inputs)

    # The loss by nothing but transformers: the project, PEFT and bitsandbytes are not there.
    program = """
import json, sys
sys.modules["peft"] = sys.modules["bitsandbytes"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, rows = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
loss = tokens = 0
for line in open(rows):
    messages = json.loads(line)["messages"]
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    answer = tokenizer(messages[-1]["content"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    loss += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
    tokens += len(answer)
print(loss / tokens)
"""
    command = [sys.executable, "-c", program, str(inputs["model"]), str(inputs["dataset"] / "eval.jsonl")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    certified = certificate(inputs)["forms"]["certification"]["dequantized"]["loss"]
    assert float(process.stdout) == pytest.approx(certified, abs=1e-5)
