"""A line whose adapter cannot be merged: published alone, pulled, asked over its base, and then the champion."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "training.md"

QUESTION = "I want my money back for order number 1003"
BOTTLENECK = {"method": "bottleneck", "learning_rate": 2e-2, "epochs": 4}
IA3 = {"method": "ia3", "learning_rate": 5e-2, "epochs": 6}
PROMPT = {"method": "prompt", "num_virtual_tokens": 8, "learning_rate": 0.1, "epochs": 8}
# A prompt over a random model learns which answers there are, and not much more.
BY_LOSS = {"primary_metric": "loss", "max_loss_to_champion": 1.0, "min_stopped_fraction": 0.01}
OVER_16_BITS = {"base": "original", "max_loss_increase_nats": 5.0}
LABELS = {"refund", "delivery", "login"}


@pytest.mark.soak
def test_a_prompt_is_published_alone_pulled_and_asked_and_then_is_the_champion(
    make_project: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    project = make_project(rows=180, train=PROMPT, evaluate=BY_LOSS, merge=OVER_16_BITS)
    result = project.run()
    assert result.exit_code == 0, result.text
    pulled = project.cli("pull", "tiny@production", tmp_path / "m", "--root", project.root)
    assert pulled.exit_code == 0, pulled.text

    # No weights but the adapter's, and what a consumer needs to find the base and to render chats.
    version = tmp_path / "m"
    files = (version / "current").resolve()
    weights = [path.relative_to(files).as_posix() for path in files.rglob("*.safetensors")]
    assert weights == ["adapter/adapter_model.safetensors"]
    reference = json.loads((version / "model/base.json").read_text())
    assert set(reference["files"]) == {"config.json", "model.safetensors"}
    certificate = json.loads((version / "evaluation/certificate.json").read_text())
    assert list(certificate["exports"]) == ["adapter"]
    assert (version / "model/generation_config.json").is_file()
    card = (version / "README.md").read_text()
    assert "This version is an adapter alone" in card
    assert str(project.folder) not in card + (version / "manifest.json").read_text()

    # It answers over its base, wherever that is, and over no other one.
    answer = project.cli("ask", version, "--base", tiny_model, QUESTION)
    assert answer.exit_code == 0, answer.text
    assert answer.out.strip() in LABELS
    without = project.cli("ask", version, QUESTION)
    assert without.exit_code == 12
    assert "give its folder with --base" in without.text
    changed_base = tmp_path / "other"
    shutil.copytree(tiny_model, changed_base)
    config = json.loads((changed_base / "config.json").read_text())
    (changed_base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    refused = project.cli("ask", version, "--base", changed_base, QUESTION)
    assert refused.exit_code == 12
    assert "is an adapter over another base model" in refused.text

    # The next run compares its model with it, as the same adapter over the same base.
    again = project.run("--set", "train.seed=1", "--set", "evaluate.min_gain_over_base=0")
    assert again.exit_code in (0, 11), again.text
    assert "champion: 33 rows scored" in again.out
    evaluations = sorted((project.folder / "store/artifacts/evaluation").glob("*/*/evaluation.json"))
    losses = [json.loads(path.read_text())["contestants"] for path in evaluations]
    champion = next(contestants["champion"] for contestants in losses if "champion" in contestants)
    assert champion["loss"] == pytest.approx(certificate["forms"]["certification"]["original"]["loss"], abs=1e-6)

    # A run over another base cannot, and says so before it begins.
    project.config.write_text(project.config.read_text().replace(str(tiny_model), str(changed_base)))
    elsewhere = project.cli("plan", project.config, "--root", project.root)
    assert elsewhere.exit_code == 12
    assert "is an adapter over another base model: config.json is another one" in elsewhere.text


def test_an_adapter_over_4_bits_finds_its_base_in_the_store_and_several_answer_over_one_base(
    make_project: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    project = make_project(rows=180, train=BOTTLENECK, evaluate=BY_LOSS, merge={"base": "dequantized"})
    result = project.run()
    assert result.exit_code == 0, result.text
    alone = tmp_path / "alone"
    assert project.cli("pull", "tiny@production", alone, "--root", project.root).exit_code == 0
    certificate = json.loads((alone / "evaluation/certificate.json").read_text())
    assert certificate["base"] == "dequantized"
    # It computes what was evaluated.
    losses = {form["loss"] for form in certificate["forms"]["certification"].values()}
    assert len(losses) == 1
    answers = [
        project.cli("ask", alone, *where, QUESTION) for where in (["--root", project.root], ["--base", tiny_model])
    ]
    assert [answer.exit_code for answer in answers] == [0, 0], answers[0].text + answers[1].text
    assert answers[0].out == answers[1].out
    assert answers[0].out.strip() in LABELS

    # Over a base that is loaded once; an adapter of the store needs no pull.
    words = ["--adapter", f"here={alone}", "--adapter", "there=tiny@production", "--root", project.root]
    several = project.cli("ask", tiny_model, *words, QUESTION)
    assert several.exit_code == 0, several.text
    assert several.out.splitlines() == [f"{name}: {answers[0].out.strip()}" for name in ("here", "there")]


def test_a_lora_without_its_merged_model_is_pulled_asked_and_then_is_the_champion(
    make_project: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    parts = {"publish": {"parts": ["adapter"], "base_model_id": "acme/tiny"}, "merge": {"base": "original"}}
    project = make_project(rows=180, evaluate={"min_gain_over_base": 0.0}, **parts)
    result = project.run()
    assert result.exit_code == 0, result.text
    version = tmp_path / "m"
    pulled = project.cli("pull", "tiny@production", version, "--root", project.root)
    assert pulled.exit_code == 0, pulled.text
    files = (version / "current").resolve()
    weights = [path.relative_to(files).as_posix() for path in files.rglob("*.safetensors")]
    assert weights == ["adapter/adapter_model.safetensors"]
    assert json.loads((version / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"

    # The quality over either base is on the certificate, and the card repeats it.
    certificate = json.loads((version / "evaluation/certificate.json").read_text())
    served = certificate["served_adapter"]
    assert served["original"]["loss"] == certificate["exports"]["adapter"]["loss"]
    card = (version / "README.md").read_text()
    for base, title in (("original", "16 bits"), ("packed", "packed")):
        row = next(line for line in card.splitlines() if line.startswith(f"| {title} "))
        assert f"{served[base]['loss']:.4f}" in row
    cost = json.loads((version / "cost.json").read_text())
    assert cost["steps"]["train_qlora"]["tokens"] > 0
    assert cost["steps"]["train_qlora"]["peak_memory_mib"] > 100

    # It answers over its base.
    answer = project.cli("ask", version, "--base", tiny_model, QUESTION)
    assert answer.exit_code == 0, answer.text
    assert answer.out.strip() in LABELS
    assert answer_as_documented(tiny_model, version) == answer.out.strip()

    # The next run compares its model with it, as it was certified.
    again = project.run("--set", "train.seed=1")
    assert again.exit_code in (0, 11), again.text
    evaluations = sorted((project.folder / "store/artifacts/evaluation").glob("*/*/evaluation.json"))
    documents = [json.loads(path.read_text())["contestants"] for path in evaluations]
    champion = next(contestants["champion"] for contestants in documents if "champion" in contestants)
    assert champion["loss"] == pytest.approx(served["original"]["loss"], abs=1e-6)


def answer_as_documented(base: Path, version: Path) -> str:
    """Run the program of docs/training.md in the folder of a version; return what it answers to the question."""
    (program,) = re.findall(r"```python\n(import json.*?PeftModel.*?)```", DOCUMENT.read_text(), re.DOTALL)
    for documented, own in [('"owner/name"', repr(str(base))), ('"I want my money back"', repr(QUESTION))]:
        assert program.count(documented) == 1
        program = program.replace(documented, own)
    completed = subprocess.run([sys.executable, "-c", program], cwd=version, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


@pytest.mark.soak
def test_scales_are_merged_exported_and_asked(make_project: Callable[..., Any], tmp_path: Path) -> None:
    merge = {"exports": ["bf16", "nf4"], "max_loss_increase_nats": 5.0, "max_export_loss_increase_nats": 5.0}
    project = make_project(rows=180, train=IA3, evaluate=BY_LOSS, merge=merge)
    result = project.run()
    assert result.exit_code == 0, result.text
    assert project.cli("pull", "tiny@production", tmp_path / "m", "--root", project.root).exit_code == 0
    assert json.loads((tmp_path / "m/adapter/adapter_config.json").read_text())["peft_type"] == "IA3"
    assert (tmp_path / "m/model/exports/nf4/model.safetensors").is_file()
    answer = project.cli("ask", tmp_path / "m", QUESTION)
    assert answer.exit_code == 0, answer.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.method=prompt", "merge.exports=[bf16, gguf-q8_0]"], "cannot be merged, so it ships alone"),
        (["train.method=ia3", "merge.rank=4"], "with train.method: ia3 there is no B A to cut or weaken"),
        (["train.method=bottleneck", "train.alpha=8"], "method: bottleneck has no matrices A and B"),
    ],
)
def test_what_cannot_be_is_refused_before_a_run(
    make_project: Callable[..., Any], settings: list[str], message: str
) -> None:
    project = make_project(rows=30)
    refused = project.cli("check", project.config, *(word for setting in settings for word in ("--set", setting)))
    assert refused.exit_code == 12
    assert message in refused.text
