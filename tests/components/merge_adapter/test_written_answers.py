"""Text tasks: every form of the merged model writes its answers, and is certified by what it wrote."""

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

FORM = '["{}",1]'
WRITTEN = ("exact_match", "rouge_l", "chrf", "json_validity", "field_accuracy")
SETTINGS = EvaluateConfig(
    first_release=True, bootstrap_samples=200, device="cpu", metrics=("loss", *WRITTEN), primary="field_accuracy",
    max_new_tokens=16, floors={"json_validity": 0.5, "rouge_l": 0.5}, slice_floor=0.3, min_slice_rows=12,
)  # fmt: skip


@pytest.fixture
def written(
    tiny_model: Path, tiny_nf4: Path, json_adapter: Path, write_dataset: Callable[..., Path], tmp_path: Path
) -> dict[str, Any]:
    """What the merge step reads, after an evaluation of what the tiny model writes."""
    folders = {"base_model": tiny_model, "base_nf4": tiny_nf4, "adapter": json_adapter}
    dataset, evaluation = write_dataset(tmp_path / "dataset", golden=12, task="text", form=FORM), tmp_path / "eva"
    evaluation.mkdir()
    (tmp_path / "model").mkdir()
    report = evaluate(SETTINGS, dataset, **folders, champion=None, anchor=None, golden_data=None, reference_data=None,
                      evaluation=evaluation)  # fmt: skip
    assert report.refused is None
    assert report.numbers["field_accuracy_challenger"] > report.numbers["field_accuracy_base"]
    return {"dataset": dataset, **folders, "evaluation": evaluation, "reference_data": None,
            "model": tmp_path / "model"}  # fmt: skip


def certificate(inputs: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((inputs["model"] / "certificate.json").read_text())
    return found


def answers(folder: Path, dataset: Path, suite: str) -> dict[str, tuple[str, str]]:
    """(right answer, what the model writes) by row id, each row alone and without a cache."""
    model, tokenizer = loading.load_base(folder, dtype="float32"), chat.load_tokenizer(folder)
    found = {}
    for line in (dataset / f"{suite}.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = chat.prompt_ids(tokenizer, row["messages"][:-1])
        start = len(ids)
        while len(ids) < start + SETTINGS.max_new_tokens and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        found[row["id"]] = (
            row["messages"][-1]["content"],
            tokenizer.decode(ids[start:], skip_special_tokens=True).strip(),
        )
    return found


def by_hand(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """The means of what needs no code of ours: equality, sacrebleu's chrF, JSON and its two entries."""

    def fields(wanted: str, text: str) -> float:
        try:
            found = json.loads(text)
        except ValueError:
            return 0.0
        return (
            sum(a == b for a, b in zip(json.loads(wanted), found if isinstance(found, list) else [], strict=False)) / 2
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
    written: dict[str, Any], tmp_path: Path
) -> None:
    report = run(MergeConfig(device="cpu", min_rows=18, exports=["bf16", "gguf-q8_0"]), **written)
    assert report.refused is None
    found = certificate(written)
    halves: dict[str, set[str]] = {"selection": set(), "certification": set()}
    for half in halves:
        assert set(found["forms"][half]) == {"live", "dequantized", "original"}
        for numbers in found["forms"][half].values():
            assert {*WRITTEN, *(f"{name}_low" for name in WRITTEN)} <= set(numbers)
    for name in ("dequantized", "original"):
        folder = tmp_path / name
        folder.mkdir()
        merge(written["base_model"], written["base_nf4"], written["adapter"], folder,
              dequantized=name == "dequantized", max_shard_gib=5.0)  # fmt: skip
        pairs = answers(folder, written["dataset"], "eval")
        expected = by_hand(list(pairs.values()))
        assert 0 < expected["exact_match"] < expected["field_accuracy"] < 1  # no form is perfect, so the numbers tell
        both = [found["forms"][half][name] for half in halves]  # 18 rows each
        for metric, value in expected.items():
            assert (both[0][metric] + both[1][metric]) / 2 == pytest.approx(value), (name, metric)
    for export in found["exports"].values():
        assert set(WRITTEN) <= set(export)
    assert set(WRITTEN) <= set(found["golden"]["merged"])
    assert report.numbers["field_accuracy_live"] == found["forms"]["certification"]["live"]["field_accuracy"]
    page = (written["model"] / "report.html").read_text()
    for title in ("ROUGE-L", "chrF", "JSON validity", "field accuracy", "exact match"):
        assert page.count(title) >= 4  # both halves, golden rows and exports
    assert "order number" not in page


def test_the_rules_are_held_against_what_the_form_that_ships_writes(written: dict[str, Any]) -> None:
    run(MergeConfig(device="cpu", base="original"), **written)
    found = certificate(written)
    rules = {rule["name"]: rule for rule in found["rules"]}
    expected = by_hand(list(answers(written["model"], written["dataset"], "eval").values()))
    assert rules["json_validity_floor"]["value"] == pytest.approx(expected["json_validity"])
    base = json.loads((written["evaluation"] / "evaluation.json").read_text())["contestants"]["base"]
    gain = expected["field_accuracy"] - base["field_accuracy"]
    assert rules["gain_over_base"]["value"] == pytest.approx(gain)
    assert {"rouge_l_floor", "slices", "slice_floor", "golden"} <= set(rules)


def test_a_merged_form_that_writes_no_json_is_refused_though_the_live_model_passed(
    written: dict[str, Any], tmp_path: Path
) -> None:
    adapter = tmp_path / "weak"
    shutil.copytree(written["adapter"], adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 0.1 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    report = run(MergeConfig(device="cpu", base="original"), **{**written, "adapter": adapter})
    assert report.refused is not None
    assert report.refused.exit_code == Exit.QUALITY_REFUSED
    rules = {rule["name"]: rule for rule in certificate(written)["rules"]}
    assert rules["json_validity_floor"]["passed"] is False
    assert rules["json_validity_floor"]["value"] < 0.1
    assert "JSON validity 0.0000" in str(report.refused)
