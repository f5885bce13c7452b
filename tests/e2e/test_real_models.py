"""Real models of other families through the whole pipeline: what is published answers, and stops by itself.

`QLORA_RETRAIN_REAL_MODELS` names a folder with model folders; `gemma3-270m` is a pretrained Gemma 3 without a chat
template, `qwen2.5-coder-1.5b` an instruction-tuned Qwen 2.5.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_retrain.pipeline.code_identity import project_root

LINE = project_root() / "pipelines" / "support-intents.yaml"
QUESTIONS = ("Where is my parcel? It should have been here on Monday.", "I cannot sign in any more.")
SHORT = [
    "data.max_eval_rows=60",
    "merge.min_prompts=30",
    "evaluate.min_accuracy=0.0",
    "evaluate.min_gain_over_base=0.0",
    "evaluate.bootstrap_samples=1000",
    "evaluate.stop_rows=40",
    "evaluate.train_rows=0",
    "evaluate.intruder_top_k=0",
]
# The model's folder, its settings, and the token with which an answer must end.
MODELS = {
    "gemma3-270m": (["train.max_steps=60", "data.template=gemma", "merge.base=dequantized"], "<end_of_turn>"),
    "qwen2.5-coder-1.5b": (["train.max_steps=15", "merge.base=original"], "<|im_end|>"),
}


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_is_published_answers_and_stops(make_project: Any, tmp_path: Path, name: str) -> None:
    models = os.environ.get("QLORA_RETRAIN_REAL_MODELS")
    if not models or not (Path(models) / name).is_dir():
        pytest.skip(f"QLORA_RETRAIN_REAL_MODELS names no folder with {name}: this real model was NOT tried")
    settings, end = MODELS[name]
    root = (tmp_path / "store").as_uri()
    overrides = [f"sources.base_model={Path(models, name)}", *SHORT, *settings]
    project = make_project(fresh=True)
    result = project.cli("run", LINE, "--root", root, *(f"--set={s}" for s in overrides), timeout=7000)
    assert result.exit_code == 0, result.text

    pulled = tmp_path / "pulled"
    assert project.cli("pull", "support-intents@production", pulled, "--root", root).exit_code == 0
    evaluation = json.loads((pulled / "evaluation/evaluation.json").read_text())
    (rule,) = [rule for rule in evaluation["rules"] if rule["name"] == "answers_end"]
    assert rule["passed"]
    assert rule["value"] >= 0.9

    # As a consumer that knows nothing of this project: plain transformers, with the model's own settings.
    tokenizer = AutoTokenizer.from_pretrained(pulled / "model")
    model = AutoModelForCausalLM.from_pretrained(pulled / "model", dtype=torch.bfloat16)
    system = yaml.safe_load(LINE.read_text())["data"].get("system")
    for question in QUESTIONS:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(generated[-1:]) == end, tokenizer.decode(generated)
        assert len(generated) < 20
