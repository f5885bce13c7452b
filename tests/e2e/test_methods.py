"""Lines that train otherwise than QLoRA, from the data to an answer of the pulled version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.config.methods import METHODS

# Settings with which a method learns the tiny model's intents in seconds, beside the line's own.
SETTINGS: dict[str, dict[str, object]] = {
    "lora+": {"learning_rate": 1e-3},
    "lora-xs": {"learning_rate": 5e-3, "rank": 32},
    "adalora": {"learning_rate": 1e-2},
}
# The tiny model's weights are random, and these methods cannot make it know intents: they are judged by the loss.
BY_LOSS = {"primary_metric": "loss", "min_gain_over_base": 0.0, "stop_rows": 0}
OF_FEW_NUMBERS = ("ia3", "prompt", "prefix", "bottleneck")
FULL = {"method": "full", "learning_rate": 2e-3, "epochs": 8, "optimizer": "paged_adamw_8bit"}


@pytest.mark.slow
def test_lora_over_16_bits_is_published_pulled_and_asked(make_project: Callable, tmp_path: Path) -> None:
    project = make_project(rows=180, quantize={"format": "none"}, train={"epochs": 6})
    result = project.run()
    assert result.exit_code == 0, result.text
    pulled = project.cli("pull", "tiny@production", tmp_path / "m", "--root", project.root)
    assert pulled.exit_code == 0, pulled.text
    certificate = json.loads((tmp_path / "m/evaluation/certificate.json").read_text())
    assert certificate["base"] == "original"
    assert "over its 16-bit weights" in certificate["why"]
    assert set(certificate["forms"]["certification"]) == {"live", "original"}
    # Merged, it differs from the unmerged model by the rounding of the sum to bf16 alone.
    losses = [form["loss"] for form in certificate["forms"]["certification"].values()]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert "16-bit base" in (tmp_path / "m/README.md").read_text()
    answer = project.cli("ask", tmp_path / "m", "I want my money back for order number 1003")
    assert answer.exit_code == 0, answer.text
    assert "refund" in answer.out


@pytest.mark.slow
def test_a_fully_trained_model_is_published_once_pulled_and_asked_and_then_is_the_champion(
    make_project: Callable, tmp_path: Path
) -> None:
    project = make_project(rows=180, quantize={"format": "none"}, train=FULL)
    result = project.run()
    assert result.exit_code == 0, result.text
    assert "adapter: none, since all weights train" in result.out
    pulled = project.cli("pull", "tiny@production", tmp_path / "m", "--root", project.root)
    assert pulled.exit_code == 0, pulled.text

    # The version has the weights once.
    current = tmp_path / "m" / "current"
    weights = [path.relative_to(current).as_posix() for path in current.rglob("*.safetensors")]
    assert weights == ["model/model.safetensors"]
    certificate = json.loads((tmp_path / "m/evaluation/certificate.json").read_text())
    assert "all weights trained (train.method: full)" in certificate["why"]
    losses = [form["loss"] for form in certificate["forms"]["certification"].values()]
    assert losses[0] == losses[1]
    evaluation = json.loads((tmp_path / "m/evaluation/evaluation.json").read_text())
    assert len(evaluation["intruder_dimensions"]) > 0
    assert "Full fine-tuning: all weights trained" in (tmp_path / "m/README.md").read_text()
    answer = project.cli("ask", tmp_path / "m", "I want my money back for order number 1003")
    assert answer.exit_code == 0, answer.text
    assert "refund" in answer.out

    # The next run compares its model with it.
    again = project.run("--set", "train.seed=1", "--set", "evaluate.min_gain_over_base=0")
    assert again.exit_code in (0, 11), again.text
    assert "champion: " in again.out


@pytest.mark.soak
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"lora", "full"}))
def test_a_line_of_every_method_is_published_pulled_and_asked(
    make_project: Callable, method: str, tmp_path: Path
) -> None:
    train = {"method": method, **SETTINGS.get(method, {})}
    evaluate = BY_LOSS if method in OF_FEW_NUMBERS else {}
    base_format = METHODS[method].formats[-1]
    project = make_project(rows=240, quantize={"format": base_format}, train=train, evaluate=evaluate)
    result = project.run()
    assert result.exit_code == 0, result.text
    pulled = project.cli("pull", "tiny@production", tmp_path / "m", "--root", project.root)
    assert pulled.exit_code == 0, pulled.text
    # An adapter alone is asked over the base of the store.
    base = ("--root", project.root) if METHODS[method].ships_alone else ()
    answer = project.cli("ask", tmp_path / "m", "I want my money back for order number 1003", *base)
    assert answer.exit_code == 0, answer.text
    assert answer.out.strip() in ("refund", "login", "delivery") or method in OF_FEW_NUMBERS
    unchanged = project.run()
    assert unchanged.exit_code == 0, unchanged.text
    assert "unchanged: production is already" in unchanged.out


@pytest.mark.slow
@pytest.mark.parametrize(("base_format", "method"), [("nf4-shifted", "ir-qlora"), ("mixed", "lq-lora")])
def test_a_base_of_our_own_layers_is_trained_over_merged_published_and_asked(
    make_project: Callable, tmp_path: Path, base_format: str, method: str
) -> None:
    project = make_project(rows=180, quantize={"format": base_format}, train={"method": method, "epochs": 10})
    result = project.run()
    assert result.exit_code == 0, result.text
    pulled = project.cli("pull", "tiny@production", tmp_path / "m", "--root", project.root)
    assert pulled.exit_code == 0, pulled.text
    # The base with dequantized values and the adapter merged in is the unmerged model, up to rounding to bf16.
    certificate = json.loads((tmp_path / "m/evaluation/certificate.json").read_text())
    losses = {name: form["loss"] for name, form in certificate["forms"]["certification"].items()}
    bits = "4- and 8-bit" if base_format == "mixed" else "4-bit"
    assert f"those of the {bits} base with its adapter" in (tmp_path / "m/README.md").read_text()
    if "dequantized" in losses:
        assert losses["dequantized"] == pytest.approx(losses["live"], abs=0.02)
    answer = project.cli("ask", tmp_path / "m", "I want my money back for order number 1003")
    assert answer.exit_code == 0, answer.text
    assert "refund" in answer.out


@pytest.mark.soak
def test_qa_lora_over_int4_is_published_in_16_and_in_4_bits(make_project: Callable, tmp_path: Path) -> None:
    exports = {"exports": ["bf16", "gguf-q4_1"], "max_export_loss_increase_nats": 0.1}
    project = make_project(
        rows=180, quantize={"format": "int4"}, train={"method": "qa-lora", "epochs": 6}, merge=exports
    )
    result = project.run()
    assert result.exit_code == 0, result.text
    assert "gguf-q4_1: the codes of base_nf4 with the adapter in their minima" in result.text
    pulled = project.cli("pull", "tiny@production", tmp_path / "m", "--root", project.root)
    assert pulled.exit_code == 0, pulled.text
    certificate = json.loads((tmp_path / "m/evaluation/certificate.json").read_text())
    live = certificate["forms"]["certification"]["live"]["loss"]
    assert certificate["exports"]["gguf-q4_1"]["loss"] == pytest.approx(live, abs=0.05)
    assert (tmp_path / "m/model/exports/gguf-q4_1/model-q4_1.gguf").is_file()
    answer = project.cli("ask", tmp_path / "m", "I want my money back for order number 1003")
    assert answer.exit_code == 0, answer.text
    assert "refund" in answer.out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.method=qa-lora"], "set quantize.format: int4, or train.method: lora"),
        (["train.method=full"], "set quantize.format: none, or train.method: lora"),
        (["train.method=qdylora", "quantize.format=none"], "set quantize.format: nf4, or train.method: dylora"),
        (["quantize.format=none", "quantize.double_quant=false"], "format is none; leave it out"),
        (["train.method=ia3", "merge.rank=4"], ".yaml:11: merge.rank and merge.strength: with train.method: ia3"),
        (
            ["train.start=champion", "train.method=dora"],
            "set train.start: base, or train.method: lora, rslora or lora+",
        ),
        (["merge.soup=3", "train.method=dora"], "leave merge.soup out, or set train.method: lora"),
        (["data.replay_fraction=0.1"], "sources.replay_data is not set"),
        (["quantize.quant_type=fp4"], "quantize.quant_type is now quantize.format"),
        (
            ["quantize.format=none", "train.method=full", "train.parallel=fsdp", "train.num_processes=2"],
            "parallel: ddp",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_run_with_the_nearest_that_can(
    make_project: Callable, settings: list[str], message: str
) -> None:
    project = make_project(rows=30)
    for command in (["check", project.config], ["plan", project.config, "--root", project.root]):
        refused = project.cli(*command, *(word for setting in settings for word in ("--set", setting)))
        assert refused.exit_code == 12
        assert message in refused.text
    assert not (project.folder / "store").exists()
