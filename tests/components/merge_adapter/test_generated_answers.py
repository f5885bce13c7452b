"""Text tasks: every form of the merged model generates its answers, and is certified by them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu import sentence_chrf
from safetensors.torch import load_file, save_file

from components.evaluate.step import run as evaluate
from components.merge_adapter.merge import merge
from components.merge_adapter.step import run
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.core.errors import Exit
from qlora_retrain.lm import chat, loading

ANSWER_FORMAT = '["{}",1]'
COMPLETION_METRICS = ("exact_match", "rouge_l", "chrf", "json_validity", "field_accuracy")
SETTINGS = EvaluateConfig(
    allow_first_release=True, bootstrap_samples=200, device="cpu", metrics=("loss", *COMPLETION_METRICS),
    primary_metric="field_accuracy",
    max_new_tokens=16, floors={"json_validity": 0.5, "rouge_l": 0.5}, slice_floor=0.3, min_slice_prompts=12,
)  # fmt: skip


@pytest.fixture
def text_inputs(
    tiny_model: Path, tiny_nf4: Path, json_adapter: Path, write_dataset: Callable[..., Path], tmp_path: Path
) -> dict[str, Any]:
    """Evaluate the tiny model's generated answers, and return what the merge step reads."""
    folders = {"base_model": tiny_model, "base_nf4": tiny_nf4, "adapter": json_adapter}
    dataset, evaluation = (
        write_dataset(tmp_path / "dataset", golden=12, task="text", form=ANSWER_FORMAT),
        tmp_path / "eva",
    )
    evaluation.mkdir()
    (tmp_path / "model").mkdir()
    report = evaluate(SETTINGS, dataset, **folders, champion=None, anchor=None, golden_data=None, reference_data=None,
                      evaluation=evaluation)  # fmt: skip
    assert report.refused is None
    assert report.numbers["field_accuracy_challenger"] > report.numbers["field_accuracy_base"]
    return {"dataset": dataset, **folders, "evaluation": evaluation, "reference_data": None,
            "model": tmp_path / "model"}  # fmt: skip


def certificate(inputs: dict[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((inputs["model"] / "certificate.json").read_text())
    return document


def answers(folder: Path, dataset: Path, suite: str) -> dict[str, tuple[str, str]]:
    """Return (right answer, generated answer) by row id, each row alone and without a cache."""
    model, tokenizer = loading.load_base(folder, dtype="float32"), chat.load_tokenizer(folder)
    pairs = {}
    for line in (dataset / f"{suite}.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer.prompt_ids(row["messages"][:-1])
        start = len(ids)
        # Greedy decoding by its definition: one full forward pass for every token.
        while len(ids) < start + SETTINGS.max_new_tokens and (len(ids) == start or ids[-1] not in tokenizer.stop_ids):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        pairs[row["id"]] = (
            row["messages"][-1]["content"],
            tokenizer.decode(ids[start:], skip_special_tokens=True).strip(),
        )
    return pairs


def metrics_by_hand(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Compute the mean metrics without the project's code: equality, sacrebleu's chrF, JSON and its two entries."""

    def fields(answer: str, text: str) -> float:
        try:
            value = json.loads(text)
        except ValueError:
            return 0.0
        return (
            sum(a == b for a, b in zip(json.loads(answer), value if isinstance(value, list) else [], strict=False)) / 2
        )

    def valid(text: str) -> bool:
        try:
            json.loads(text)
        except ValueError:
            return False
        return True

    count = len(pairs)
    return {
        "exact_match": sum(a == b for a, b in pairs) / count,
        "chrf": math.fsum(sentence_chrf(b, [a]).score / 100 for a, b in pairs) / count,
        "json_validity": sum(valid(b) for _, b in pairs) / count,
        "field_accuracy": math.fsum(fields(a, b) for a, b in pairs) / count,
    }


def test_both_candidates_and_every_export_are_measured_by_what_they_write(
    text_inputs: dict[str, Any], tmp_path: Path
) -> None:
    report = run(MergeConfig(device="cpu", min_prompts=18, exports=["bf16", "gguf-q8_0"]), **text_inputs)
    assert report.refused is None
    document = certificate(text_inputs)
    halves: dict[str, set[str]] = {"selection": set(), "certification": set()}
    for half in halves:
        assert set(document["forms"][half]) == {"live", "dequantized", "original"}
        for numbers in document["forms"][half].values():
            assert {*COMPLETION_METRICS, *(f"{name}_low" for name in COMPLETION_METRICS)} <= set(numbers)

    # Each candidate is merged again, and its answers generated and measured in another way.
    for name in ("dequantized", "original"):
        folder = tmp_path / name
        folder.mkdir()
        merge(text_inputs["base_model"], text_inputs["base_nf4"], text_inputs["adapter"], folder,
              dequantized=name == "dequantized", max_shard_gib=5.0)  # fmt: skip
        pairs = answers(folder, text_inputs["dataset"], "eval")
        expected = metrics_by_hand(list(pairs.values()))
        assert 0 < expected["exact_match"] < expected["field_accuracy"] < 1  # no form is perfect, so the numbers tell
        both = [document["forms"][half][name] for half in halves]  # 18 rows each
        for metric, value in expected.items():
            assert (both[0][metric] + both[1][metric]) / 2 == pytest.approx(value), (name, metric)

    # Every other form, the golden rows and the report have the same metrics.
    for export in document["exports"].values():
        assert set(COMPLETION_METRICS) <= set(export)
    assert set(COMPLETION_METRICS) <= set(document["golden"]["merged"])
    assert report.numbers["field_accuracy_live"] == document["forms"]["certification"]["live"]["field_accuracy"]
    page = (text_inputs["model"] / "report.html").read_text()
    for title in ("ROUGE-L", "chrF", "JSON validity", "field accuracy", "exact match"):
        assert page.count(title) >= 4  # both halves, golden rows and exports
    assert "order number" not in page


def test_the_rules_judge_what_the_form_that_ships_generates(text_inputs: dict[str, Any]) -> None:
    run(MergeConfig(device="cpu", base="original"), **text_inputs)
    document = certificate(text_inputs)
    rules = {rule["name"]: rule for rule in document["rules"]}
    expected = metrics_by_hand(list(answers(text_inputs["model"], text_inputs["dataset"], "eval").values()))
    assert rules["json_validity_floor"]["value"] == pytest.approx(expected["json_validity"])

    # The base model's number is the evaluation's own: only the challenger is measured again.
    base = json.loads((text_inputs["evaluation"] / "evaluation.json").read_text())["contestants"]["base"]
    gain = expected["field_accuracy"] - base["field_accuracy"]
    assert rules["gain_over_base"]["value"] == pytest.approx(gain)
    assert {"rouge_l_floor", "slices", "slice_floor", "golden"} <= set(rules)


def test_a_merged_form_that_writes_no_json_is_refused_though_the_live_model_passed(
    text_inputs: dict[str, Any], tmp_path: Path
) -> None:
    # A tenth of every matrix is a hundredth of the adapter's effect: the merged form is the base again.
    adapter = tmp_path / "weak"
    shutil.copytree(text_inputs["adapter"], adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 0.1 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")

    report = run(MergeConfig(device="cpu", base="original"), **{**text_inputs, "adapter": adapter})
    assert report.refused is not None
    assert report.refused.exit_code == Exit.QUALITY_REFUSED
    rules = {rule["name"]: rule for rule in certificate(text_inputs)["rules"]}
    assert rules["json_validity_floor"]["passed"] is False
    assert rules["json_validity_floor"]["value"] < 0.1
    assert "JSON validity 0.0000" in str(report.refused)
