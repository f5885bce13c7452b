"""Training goes on from the adapter that ships: the first forward pass is production's, and resuming is as ever."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from components.train_qlora import adapter, preflight, warm_start
from components.train_qlora.step import run
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import signals
from qlora_retrain.core.errors import IntegrityError, TryAgain, UsageError
from qlora_retrain.lm import loading
from tests.components.train_qlora.adapted import SETTINGS, adapted
from tests.components.train_qlora.conftest import SMALL, Step

START: dict[str, Any] = {"start": "champion"}
Champion = Callable[..., Path]


@pytest.fixture
def champion(tmp_path: Path) -> Champion:
    """Make a version's folder of an adapter in training, as it ships."""

    def make(nf4: Path, eval_fraction: float | None = 0.2, **settings: Any) -> Path:
        model, config = adapted(nf4, settings.pop("method", "lora"), **settings)
        folder = tmp_path / "champion"
        (folder / "adapter").mkdir(parents=True)
        adapter.export(model.eval(), folder / "adapter", config)
        return with_profile(folder, eval_fraction)

    return make


def with_profile(folder: Path, eval_fraction: float | None = 0.2) -> Path:
    (folder / "data").mkdir()
    (folder / "data/profile.json").write_text(profile(eval_fraction))
    return folder


def profile(eval_fraction: float | None, golden: str = "0" * 64) -> str:
    return json.dumps({"split": {"eval_fraction": eval_fraction}, "data_pins": {"golden_data/a.jsonl": golden}})


def with_fraction(step: Step, eval_fraction: float | None = 0.2) -> Step:
    (step.dataset / "profile.json").write_text(profile(eval_fraction))
    return step


def started(nf4: Path, start: dict[str, tuple[Tensor, Tensor]], **settings: Any) -> Any:
    config = TrainConfig(**(SETTINGS | settings | START))
    return adapter.attach_new(loading.load_nf4(nf4), config, start=start)


def go_on(step: Step, folder: Path, **settings: Any) -> dict[str, Any]:
    shutil.rmtree(step.adapter, ignore_errors=True)
    step.adapter.mkdir()
    config = TrainConfig(**(SMALL | START | settings))
    result = run(config, step.dataset, step.base_nf4, step.adapter, scratch=step.scratch, champion_adapter=folder)
    return dict(result.numbers)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {}),
        ("rslora", {"alpha": 3.0}),
        ("lora+", {"rank": 6}),
        ("lora", {"rank": 2, "rank_pattern": {".*_proj": 4}}),
    ],
)
def test_the_first_forward_pass_is_that_of_production(
    nf4: Path, champion: Champion, step, method: str, settings: dict[str, Any]
) -> None:
    folder = champion(nf4, method=method)
    start = warm_start.read(folder, with_fraction(step()).dataset)
    model = started(nf4, start, method=method, **settings).eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = loading.attach_adapter(loading.load_nf4(nf4), folder / "adapter")(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(expected, loading.load_nf4(nf4)(ids).logits)

    # Every rank learns, those beyond the champion's too: what is zero on both sides would stay so.
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            assert (parameter.grad.abs().sum(0) > 0).all()


def test_ranks_of_zeros_that_fill_up_a_layer_are_no_start(nf4: Path, champion: Champion, step) -> None:
    folder = champion(nf4, rank_pattern={"q_proj": 8})
    start = warm_start.read(folder, with_fraction(step()).dataset)
    assert {len(a) for a, _ in start.values()} == {8}
    model = started(nf4, start, rank_pattern={"q_proj": 8})
    ranks = {name: len(model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight) for name in start}
    assert {rank for name, rank in ranks.items() if name.endswith("q_proj")} == {8}
    assert {rank for name, rank in ranks.items() if not name.endswith("q_proj")} == {4}
    with pytest.raises(UsageError, match=r"has rank 8 in a layer where this run has 4; set train\.rank or"):
        started(nf4, start)


def test_a_run_begins_with_the_loss_of_production(nf4: Path, step, tmp_path: Path) -> None:
    first = with_fraction(step("first"))
    numbers = first(dropout=0.0, max_steps=30)
    assert numbers["start"] == "base"
    folder = tmp_path / "version"
    shutil.copytree(first.adapter, folder / "adapter")
    with_profile(folder)

    second = with_fraction(step("second"))
    numbers = go_on(second, folder, dropout=0.0, max_steps=1, learning_rate=1e-9)
    assert numbers["start"] == "champion"
    # A step of no size: the adapter, and its loss on the evaluation rows, stay those of production.
    assert numbers["eval_loss"] == pytest.approx(first.document["eval_loss"], rel=1e-5)
    assert "went on from the adapter of the version in production" in (second.adapter / "report.html").read_text()


def test_what_production_knows_already_does_not_stop_the_check_before_the_run(
    nf4: Path, step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = with_fraction(step("first"))
    first(dropout=0.0, max_steps=60, learning_rate=1e-2)
    folder = tmp_path / "version"
    shutil.copytree(first.adapter, folder / "adapter")
    with_profile(folder)
    monkeypatch.setattr(preflight, "MAX_TOKENS_FRACTION", 1e9)
    second = with_fraction(step("second"))
    go_on(second, folder, dropout=0.0, max_steps=1, learning_rate=1e-3)
    # It begins where the base is, and not at the loss of production.
    checked = re.search(r"preflight: 8 rows, loss ([\d.]+) to", capfd.readouterr().out)
    assert checked is not None
    assert float(checked[1]) > 2.0
    # And the check leaves the start as it was.
    assert second.document["train_loss"] < 0.5


def test_a_run_from_production_goes_on_bit_for_bit(
    nf4: Path, champion: Champion, step, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = champion(nf4)
    whole, stopped = with_fraction(step("whole")), with_fraction(step("stopped"))
    go_on(whole, folder, max_steps=6)
    checks = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(signals, "stop_requested", lambda: next(checks) >= 3)
        with pytest.raises(TryAgain):
            go_on(stopped, folder, max_steps=6)
    assert go_on(stopped, folder, max_steps=6)["resumed_at"] > 0
    assert stopped.weights == whole.weights


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_go_on_as_one_does(nf4: Path, champion: Champion, step, parallel: str) -> None:
    folder = champion(nf4)
    single, double = with_fraction(step("single")), with_fraction(step("double"))
    settings = {"dropout": 0.0, "max_steps": 6, "micro_batch_size": 2}
    go_on(single, folder, **settings)
    go_on(double, folder, **settings, num_processes=2, parallel=parallel)
    weights = [load_file(run.adapter / "adapter_model.safetensors") for run in (single, double)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-3 * float(tensor.abs().max()))


def test_an_adapter_of_other_layers_is_refused(nf4: Path, champion: Champion, step) -> None:
    folder = champion(nf4, target_modules="attention")
    with pytest.raises(UsageError, match=r"this run's adapter alone adapts model\.layers\.0\.mlp\.down_proj; set"):
        go_on(with_fraction(step()), folder)


def test_evaluation_rows_that_production_may_have_learnt_are_refused(nf4: Path, champion: Champion, step) -> None:
    folder = champion(nf4, 0.1)
    with pytest.raises(UsageError, match=r"0\.2 of the prompts are evaluation now, and 0\.1 were for the version in"):
        go_on(with_fraction(step(), 0.2), folder)
    # Evaluation files of one's own say nothing of a fraction.
    assert warm_start.read(folder, with_fraction(step("other"), None).dataset)


def test_other_golden_rows_than_before_are_named(
    nf4: Path, champion: Champion, step, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, dataset = champion(nf4), with_fraction(step()).dataset
    warm_start.read(folder, dataset)
    assert "golden_data" not in capsys.readouterr().out
    (dataset / "profile.json").write_text(profile(0.2, "1" * 64))
    warm_start.read(folder, dataset)
    assert "golden_data or eval_data is not what it was for the version in production" in capsys.readouterr().out


def test_what_no_version_ships_is_refused(nf4: Path, champion: Champion, step) -> None:
    folder = champion(nf4)
    path = folder / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 3}))
    with pytest.raises(IntegrityError, match="expected plain LoRA whose alpha is its rank"):
        go_on(with_fraction(step()), folder)
