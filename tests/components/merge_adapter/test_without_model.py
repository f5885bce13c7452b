"""A LoRA whose line ships no merged model is certified over its base, and measured over either base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.merge_adapter.step import run
from qlora_retrain.config.sections import MergeConfig
from qlora_retrain.evaluation import scoring
from qlora_retrain.lm import chat, served_model
from tests.components.merge_adapter.conftest import RULES


def test_an_adapter_that_ships_without_a_model_is_certified_over_its_base(inputs: dict[str, Path]) -> None:
    model = inputs["model"]
    config = MergeConfig(
        device="cpu", base="original", strength=0.5, ships_model=False, max_loss_increase_nats=5.0,
        exports=["bf16", "gguf-q8_0"], max_export_loss_increase_nats=None,
    )  # fmt: skip
    report = run(config, **inputs)

    # Exports are of a merged model, which itself is nowhere in the result.
    weights = {p.relative_to(model).as_posix() for p in model.rglob("*") if p.suffix in (".safetensors", ".gguf")}
    assert weights == {"adapter/adapter_model.safetensors", "exports/gguf-q8_0/model-q8_0.gguf"}
    document = json.loads((model / "certificate.json").read_text())
    assert list(document["exports"]) == ["adapter", "gguf-q8_0"]
    assert (document["base"], document["strength"], report.numbers["modules"]) == ("original", 0.5, 0)

    # The quality over either base is that of the adapter that ships, not of the one that was trained.
    served, forms = document["served_adapter"], document["forms"]["certification"]
    assert list(served) == ["original", "packed"]
    assert served["original"]["loss"] == pytest.approx(forms["original, strength 0.5"]["loss"])
    assert served["packed"]["loss"] != pytest.approx(forms["live"]["loss"], abs=1e-4)
    assert "the adapter over each base" in (model / "report.html").read_text()

    # What a consumer loads is what was certified.
    options: Any = {"device": "cpu", "attn_implementation": "eager", "dtype": "float32"}
    loaded = served_model.load(model, model / "adapter", inputs["base_model"], None, **options)
    rows = scoring.read_rows(inputs["dataset"] / "eval.jsonl", "eval")
    scores, _ = scoring.score_and_generate(RULES, loaded, chat.load_tokenizer(model), rows, None, description="again")
    loss = sum(score.loss_nats for score in scores) / sum(score.tokens for score in scores)
    assert served["original"]["loss"] == pytest.approx(loss, abs=1e-5)
