"""The mean of this run's adapter and of earlier versions' is one more form, which ships where it is better."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components.evaluate.step import run as evaluate
from components.merge_adapter import adapter_forms, soup
from components.merge_adapter.candidates import Candidate
from components.merge_adapter.form_scores import FormScores
from components.merge_adapter.lora import LoraAdapter
from components.merge_adapter.step import run
from components.merge_adapter.trials import Trial
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.evaluation.rules.rule_result import RuleResult

RULES = EvaluateConfig(allow_first_release=True, bootstrap_samples=200, device="cpu", stop_rows=0, intruder_top_k=0)
CONFIG = MergeConfig(device="cpu", base="original", soup=3, min_prompts=18, max_loss_increase_nats=50.0)
Merge = Callable[..., tuple[StepResult, dict[str, Any], Path]]


def delta(adapter: Path, module: str) -> torch.Tensor:
    """B A of a layer in fp64, with its scale."""
    with LoraAdapter(adapter) as lora:
        a, b = lora.update(module)
        return b @ a


def modules(adapter: Path) -> list[str]:
    with LoraAdapter(adapter) as lora:
        return lora.modules


def other_adapter(adapter: Path, folder: Path, seed: int, size: float = 1.0) -> Path:
    """Write an adapter of random matrices of about the same size."""
    generator = torch.Generator().manual_seed(seed)

    def change(module: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = [torch.randn(m.shape, generator=generator, dtype=m.dtype) * m.std() for m in (a, b)]
        return noise[0], noise[1] * size

    adapter_forms._rewrite(adapter, folder, 8, change, "random numbers")
    return folder


def scaled(adapter: Path, folder: Path, factor: float) -> Path:
    adapter_forms.weaken(adapter, folder, factor)
    return folder


def test_the_average_is_the_best_approximation_of_the_mean_update(tiny_adapter: Path, tmp_path: Path) -> None:
    others = [other_adapter(tiny_adapter, tmp_path / str(seed), seed) for seed in (1, 2)]
    adapter_forms.average(tiny_adapter, others, tmp_path / "soup")
    assert adapter_forms.rank_of(tmp_path / "soup") == 8
    for module in modules(tiny_adapter)[:3]:
        mean = sum(delta(adapter, module) for adapter in (tiny_adapter, *others)) / 3
        # A second way: the singular values of the whole matrix.
        left, values, right = torch.linalg.svd(mean)
        expected = left[:, :8] * values[:8] @ right[:8]
        torch.testing.assert_close(delta(tmp_path / "soup", module), expected, rtol=1e-5, atol=1e-6)


def test_the_average_of_an_adapter_and_its_multiples_loses_nothing(tiny_adapter: Path, tmp_path: Path) -> None:
    others = [scaled(tiny_adapter, tmp_path / str(factor), factor) for factor in (0.25, 1.75)]
    adapter_forms.average(tiny_adapter, others, tmp_path / "soup")
    for module in modules(tiny_adapter):
        torch.testing.assert_close(delta(tmp_path / "soup", module), delta(tiny_adapter, module), rtol=1e-5, atol=1e-6)


def test_an_adapter_of_other_layers_is_not_averaged(tiny_adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    partial = scaled(tiny_adapter, tmp_path / "20260101T000000Z-0123456789ab/adapter", 1.0)
    tensors = load_file(partial / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if "q_proj" not in name}, partial / "adapter_model.safetensors")
    with pytest.raises(IntegrityError, match="20260101T000000Z-0123456789ab: expected LoRA in the 14 layers"):
        adapter_forms.average(tiny_adapter, [partial], tmp_path / "soup")


@pytest.fixture(scope="module")
def merge_line(
    tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path, write_dataset: Callable[..., Path],
    write_reference: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory,
) -> Merge:  # fmt: skip
    """Return a function that merges a line whose adapter has learnt half of what the trained one knows."""
    work = tmp_path_factory.mktemp("line")
    evaluation = work / "evaluation"
    evaluation.mkdir()
    inputs = {
        "dataset": write_dataset(work / "dataset"),
        "base_model": tiny_model,
        "base_nf4": tiny_nf4,
        "adapter": scaled(tiny_adapter, work / "own", 0.5),
        "reference_data": None,
    }
    evaluate(RULES, **inputs, champion=None, anchor=None, golden_data=None, evaluation=evaluation)

    def merge_with(config: MergeConfig, earlier: Path | None) -> tuple[StepResult, dict[str, Any], Path]:
        model = tmp_path_factory.mktemp("merged") / "model"
        model.mkdir()
        result = run(config, **inputs, evaluation=evaluation, model=model, earlier_adapters=earlier)
        return result, json.loads((model / "certificate.json").read_text()), model

    return merge_with


def versions(folder: Path, *makers: Callable[[Path], Path]) -> Path:
    for number, make in enumerate(makers):
        (folder / f"2026010{number + 1}T000000Z-0123456789ab").mkdir(parents=True)
        make(folder / f"2026010{number + 1}T000000Z-0123456789ab" / "adapter")
    return folder


def test_a_better_average_ships_and_a_worse_one_does_not(merge_line: Merge, tiny_adapter: Path, tmp_path: Path) -> None:
    # The mean of 0.5, 1 and 1.5 is the adapter that knows the tickets.
    good = versions(
        tmp_path / "good",
        lambda folder: scaled(tiny_adapter, folder, 1.0),
        lambda folder: scaled(tiny_adapter, folder, 1.5),
    )
    result, document, model = merge_line(CONFIG, good)
    assert result.refused is None
    own, mean = document["candidates"]
    assert (own["form"], mean["form"], mean["adapters"]) == ("original", "original, soup of 3", 3)
    assert mean["loss"] < own["loss"]
    assert (own["ships"], mean["ships"]) == (False, True)
    assert (result.numbers["adapters"], result.numbers["rank"]) == (3, 8)
    assert "the mean ships: the mean of 3 adapters (this run's and those of 20260102T000000Z" in (
        model / "report.html"
    ).read_text().replace("&#x27;", "'").replace("&#39;", "'")
    for module in modules(tiny_adapter)[:2]:
        torch.testing.assert_close(delta(model / "adapter", module), delta(tiny_adapter, module), rtol=1e-5, atol=1e-6)

    bad = versions(tmp_path / "bad", lambda folder: other_adapter(tiny_adapter, folder, 1, 5.0))
    result, document, model = merge_line(CONFIG, bad)
    own, mean = document["candidates"]
    assert mean["loss"] > own["loss"]
    assert (own["ships"], mean["ships"]) == (True, False)
    assert result.numbers["adapters"] == 1
    assert not (model / "adapter").exists()
    assert "all that fit of merge.soup: 3" in (model / "report.html").read_text()


@pytest.mark.parametrize("stage", ["rank", "strength"])
def test_what_was_averaged_can_be_cut_and_weakened(
    merge_line: Merge, tiny_adapter: Path, tmp_path: Path, stage: str
) -> None:
    good = versions(tmp_path / "good", lambda folder: scaled(tiny_adapter, folder, 1.5))
    _, document, model = merge_line(CONFIG.model_copy(update={stage: {"rank": 4, "strength": 0.5}[stage]}), good)
    shipped = next(c for c in document["candidates"] if c["ships"])
    assert shipped["form"] == "original, soup of 2, " + {"rank": "rank 4", "strength": "strength 0.5"}[stage]
    module = modules(tiny_adapter)[0]
    left, values, right = torch.linalg.svd(delta(tiny_adapter, module))
    rank, factor = (4, 1.0) if stage == "rank" else (8, 0.5)
    expected = left[:, :rank] * values[:rank] @ right[:rank] * factor
    torch.testing.assert_close(delta(model / "adapter", module), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "has_earlier", "words"),
    [
        ({}, False, "the line has no earlier version that fits"),
        ({"min_prompts": 30}, True, "the evaluation rows are too few to choose on one half"),
    ],
)
def test_without_a_version_or_rows_to_choose_by_there_is_no_average(
    merge_line: Merge, tiny_adapter: Path, tmp_path: Path, settings: dict[str, Any], has_earlier: bool, words: str
) -> None:
    earlier = versions(tmp_path / "earlier", lambda folder: scaled(tiny_adapter, folder, 1.5)) if has_earlier else None
    result, document, model = merge_line(CONFIG.model_copy(update=settings), earlier)
    assert result.refused is None
    assert [candidate["form"] for candidate in document["candidates"]] == ["original"]
    assert f"no average of adapters (merge.soup), since {words}" in (model / "report.html").read_text()


def test_a_form_within_the_limits_on_forgetting_is_better_than_one_with_a_lower_loss() -> None:
    def trial(loss: float, *, passed: bool) -> Trial:
        rule = RuleResult("forgetting", "forgot", 0.5, 0.4, 0.6, 0.5, passed)
        return Trial(Candidate("original"), FormScores([], []), loss, 0.0, (rule,))

    within, beyond = trial(2.0, passed=True), trial(1.0, passed=False)
    assert soup.standing(within) < soup.standing(beyond)
    assert soup.standing(trial(1.0, passed=True)) < soup.standing(within)
    assert soup.standing(beyond) < soup.standing(trial(1.5, passed=False))
