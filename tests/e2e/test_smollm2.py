"""The demo line on its real model: a short training that learns, and a published version that loads and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from qlora_retrain.pipeline.code_identity import project_root

SHORT = [
    "train.max_steps=60",
    "data.max_eval_rows=40",
    "merge.min_prompts=20",
    # The demo's own limits are for its full training; the test asserts below what 60 steps reach.
    "evaluate.min_accuracy=0.0",
    "evaluate.min_gain_over_base=0.0",
    # With the whole schedule of rates in 60 steps the model forgets more than in the demo's 110.
    "evaluate.max_forgetting_nats=null",
    "evaluate.bootstrap_samples=1000",
    "evaluate.stop_rows=12",
    # The base without an adapter takes longest.
    "evaluate.base_rows=16",
    "evaluate.min_prompts=16",
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_model_learns_is_published_and_answers(make_project, tmp_path: Path) -> None:
    line = project_root() / "pipelines" / "support-intents.yaml"
    project = make_project(fresh=True)
    root = (tmp_path / "store").as_uri()
    result = project.cli("run", line, "--root", root, *(f"--set={s}" for s in SHORT), timeout=1700)
    assert result.exit_code == 0, result.text

    version = json.loads((tmp_path / "store/models/support-intents/aliases/production.json").read_text())["version"]
    folder = tmp_path / "store/models/support-intents/versions" / version
    scores = json.loads((folder / "evaluation/evaluation.json").read_text())["contestants"]
    assert scores["base"]["accuracy"] < 0.4
    assert scores["challenger"]["accuracy"] > scores["base"]["accuracy"] + 0.2

    pulled = tmp_path / "pulled"
    assert project.cli("pull", "support-intents@production", pulled, "--root", root).exit_code == 0
    assert AutoModelForCausalLM.from_pretrained(pulled / "model").num_parameters() == 134_515_008
    answer = project.cli("ask", pulled, "Where is my parcel? It should have been here on Monday.")
    assert answer.exit_code == 0, answer.text
    assert answer.out.strip()
    assert not list((tmp_path / "store").rglob("checkpoint-*"))
