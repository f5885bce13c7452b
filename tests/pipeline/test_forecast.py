"""What a plan says of memory, time and cost: the verdict, the setting that would fit, and what earlier runs correct."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_retrain.cli import main
from qlora_retrain.config.gpus import CARDS, GpuConfig, find_card
from qlora_retrain.config.platform import PLATFORM_VARIABLE
from qlora_retrain.config.sections import QuantizeConfig, TrainConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm.memory_model import Settings
from qlora_retrain.lm.model_shape import ModelShape
from qlora_retrain.pipeline import execute, explain, forecast, forecast_text, forecast_time, make_plan, past_runs
from qlora_retrain.pipeline.forecast import FIXED_BYTES, GIB, NotEstimated, Target, Work
from qlora_retrain.pipeline.past_runs import PastRun, RowLengths
from qlora_retrain.pipeline.plan import Plan

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
LENGTHS = RowLengths(rows=1000, tokens=200_000, supervised=100_000, long=400, longest=1000)
H100 = Target("h100", round(CARDS["h100"].memory_gib * GIB), 989e12, 3.5)


def a_work(lengths: RowLengths | None = LENGTHS, past: tuple[PastRun, ...] = (), **train: Any) -> Work:
    """The training of a 7B model on a GPU."""
    settings = {"device": "cuda", "precision": "bfloat16", "attention": "sdpa", "kernels": "torch", "alpha": 32.0}
    section = TrainConfig(**{**settings, **train}).model_dump(mode="json")
    quantize = QuantizeConfig().model_dump(mode="json")
    shape = ModelShape.from_config(LLAMA_7B)
    return Work(shape, Settings.from_sections(section, quantize), section, lengths, 2048, past)


def a_run(work: Work, peak_bytes: int | None, tokens_per_second: float | None = None, **train: Any) -> PastRun:
    quantize = QuantizeConfig().model_dump(mode="json")
    section = {**work.train, **train}
    settings = Settings.from_sections(section, quantize)
    return PastRun(section, settings, LENGTHS, work.micro_batch_size, peak_bytes, tokens_per_second)


def test_the_rows_of_the_profile_decide_and_before_they_are_counted_the_longest_that_may_pass() -> None:
    counted, uncounted = (forecast.forecast_memory(a_work(lengths)) for lengths in (LENGTHS, None))
    assert counted.low < counted.likely < counted.high < uncounted.high


def test_a_range_holds_what_is_not_torchs() -> None:
    memory = forecast.forecast_memory(a_work())
    assert memory.likely == memory.parts.total + FIXED_BYTES["cuda"]


@pytest.mark.parametrize(
    ("memory_gib", "expected"),
    [
        (200, {}),
        (24, {"micro_batch_size": 4}),
        (9, {"micro_batch_size": 4, "gradient_checkpointing": 1}),
        (5.6, {"micro_batch_size": 1, "gradient_checkpointing": 1, "optimizer": "paged_adamw_8bit"}),
        (5.4, {"micro_batch_size": 1, "gradient_checkpointing": 1, "optimizer": "paged_adamw_8bit", "rank": 8}),
        (4, None),
    ],
)
def test_what_would_fit_begins_with_what_changes_no_result(memory_gib: float, expected: dict[str, Any] | None) -> None:
    """A 7B model, rows of up to 1,000 tokens, 16 at once; the weights alone take 3.6 GiB."""
    rows = {"micro_batch_size": 16, "global_batch_size": 16}
    change = forecast.fitting_change(a_work(**rows), round(memory_gib * GIB))
    assert change == expected
    if change is not None:
        assert forecast.forecast_memory(a_work(**(rows | change))).high <= memory_gib * GIB


def test_peaks_of_earlier_runs_correct_the_estimate_and_narrow_the_range() -> None:
    work = a_work()
    plain = forecast.forecast_memory(work)
    measured = round(1.3 * plain.parts.total)
    corrected = forecast.forecast_memory(dataclasses.replace(work, past_runs=(a_run(work, measured),)))
    assert corrected.num_runs == 1
    assert corrected.likely == pytest.approx(measured + FIXED_BYTES["cuda"], rel=1e-6)
    assert corrected.high / corrected.likely < plain.high / plain.likely
    # A run in another precision, or one that measured nothing, says nothing of it.
    for run in (a_run(work, None), a_run(work, measured, precision="float32")):
        assert forecast.forecast_memory(dataclasses.replace(work, past_runs=(run,))) == plain
    # No single run, however odd its machine, makes the estimate more than twice as large.
    absurd = dataclasses.replace(work, past_runs=(a_run(work, 100 * measured),))
    assert forecast.forecast_memory(absurd).likely <= 2 * plain.likely


def test_time_follows_the_speed_of_earlier_runs_scaled_by_what_a_token_costs() -> None:
    work = a_work(epochs=3.0)
    measured = forecast_time.forecast_time(dataclasses.replace(work, past_runs=(a_run(work, None, 1000.0),)), H100)
    assert measured.likely == pytest.approx(3 * 200_000 / 1000)
    assert measured.low < measured.likely < measured.high
    # Every layer is computed twice: half as much again.
    slower = a_work(epochs=3.0, gradient_checkpointing=1)
    slower = dataclasses.replace(slower, past_runs=(a_run(work, None, 1000.0),))
    assert forecast_time.forecast_time(slower, H100).likely == pytest.approx(1.49 * measured.likely, rel=0.02)


def test_time_without_an_earlier_run_is_arithmetic_with_a_wide_range() -> None:
    time = forecast_time.forecast_time(a_work(max_steps=10, global_batch_size=16), H100)
    # 16 rows of 200 tokens, 10 steps, 4 operations for each of 6.5 billion weights, at most 60 % of 989 TFLOP/s.
    at_best = 10 * 16 * 200 * 4 * 6.48e9 / (0.6 * 989e12)
    assert at_best < time.low < 1.3 * at_best
    assert time.high > 2.5 * time.low
    # A model so small that a GPU waits for its kernels to start takes no less for being smaller.
    tiny = dataclasses.replace(a_work(max_steps=10), shape=dataclasses.replace(a_work().shape, linear_layers=()))
    assert forecast_time.forecast_time(tiny, H100).low > 0.1


@pytest.mark.parametrize(
    ("work", "target"),
    [(a_work(lengths=None), H100), (a_work(), Target("a card of one's own", GIB))],
    ids=["no rows", "no speed"],
)
def test_time_is_not_said_where_nothing_tells_it(work: Work, target: Target) -> None:
    with pytest.raises(NotEstimated):
        forecast_time.forecast_time(work, target)


def test_cards_are_found_by_name_and_an_unknown_name_is_refused_with_the_list() -> None:
    assert find_card("H100", {}) == CARDS["h100"]
    assert find_card("h100", {"h100": GpuConfig(price_per_hour=2.5)}).price_per_hour == 2.5
    assert find_card("mine", {"mine": GpuConfig(memory_gib=12.0)}).memory_gib == 12.0
    with pytest.raises(UsageError, match=r"'h10' \(did you mean h100\?\); there are a100-40gb, .*rtx-5090"):
        find_card("h10", {})
    with pytest.raises(UsageError, match="memory_gib"):
        find_card("mine", {"mine": GpuConfig(price_per_hour=1.0)})


@pytest.fixture
def planned(line: Path, root_uri: str) -> Callable[..., Plan]:
    """Plan the line with a 7B model's config.json."""

    def plan(**train: Any) -> Plan:
        (line.parent / "base" / "config.json").write_text(json.dumps(LLAMA_7B))
        overrides = [f"train.{name}={value}" for name, value in train.items()]
        return make_plan.make_plan(line, root_uri, overrides=["data.max_length_tokens=1024", *overrides])

    return plan


def set_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    path = tmp_path / "platform" / "platform.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    monkeypatch.setenv(PLATFORM_VARIABLE, str(path))


def test_the_text_has_a_verdict_the_parts_the_cost_and_the_sizes_of_the_steps(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_platform(tmp_path, monkeypatch, {"runtime": {"memory_gib": 8}, "gpus": {"h100": {"price_per_hour": 3.5}}})
    plan = planned()
    text = forecast_text.as_text(plan, gpu="h100", has_parts=True)
    assert "memory: fits h100 (79.1 GiB): needs about " in text
    assert "micro-batches of 16 rows of up to 1,024 tokens" in text
    assert "  weights         3.600 GiB" in text
    # No row is counted yet.
    assert "time: not estimated: validate_data has not counted the rows yet" in text
    assert "merge_adapter gets 8 GiB and probably needs 32" in text

    text = forecast_text.as_text(plan, gpu="l4")
    assert "memory: does not fit l4 (22 GiB)" in text
    assert "it fits with train.micro_batch_size: 4 (the same result)" in text


def test_without_a_card_a_cpu_has_the_memory_of_the_step(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_platform(tmp_path, monkeypatch, {"runtime": {"memory_gib": 5, "gpu": "l4"}})
    # The platform's card is for lines that train on one.
    assert "the 5 GiB of the step" in forecast_text.as_text(planned(device="cpu"))
    assert "l4 (22 GiB)" in forecast_text.as_text(planned(device="cuda"))


def test_what_cannot_be_read_is_said_and_no_plan_fails_for_it(made_plan: Plan) -> None:
    assert forecast_text.as_text(made_plan) == (
        "memory, time and cost: not estimated: config.json: has none of hidden_size, n_embd, d_model, and an estimate "
        "needs it"
    )


def test_an_unknown_card_is_refused_before_a_plan_is_written(
    line: Path, root_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["plan", str(line), "--root", root_uri, "--gpu", "h1000"])
    assert caught.value.code == 12
    assert "no GPU is called 'h1000'" in capsys.readouterr().err
    assert not Path(root_uri.removeprefix("file://"), "runs").exists()


def test_finished_runs_of_the_same_base_are_found_and_others_are_not(
    planned: Callable[..., Plan], small_steps: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(device="cpu", precision="float32")
    assert past_runs.read_lengths(plan) is None
    numbers = {"micro_batch_size": 16, "peak_rss_mib": 9000, "peak_gpu_mib": None, "tokens_per_second": 12.5}

    @functools.wraps(small_steps["train_qlora"])
    def train(*arguments: Any, adapter: Path, **options: Any) -> Any:
        result = small_steps["train_qlora"](*arguments, adapter=adapter, **options)
        return dataclasses.replace(result, numbers=numbers)

    profile = {"rows": {"train": 27}, "train": dict.fromkeys(("tokens", "supervised_tokens"), 270)}
    profile["train"] |= {"tokens_p95": 11, "tokens_p100": 12}

    @functools.wraps(small_steps["validate_data"])
    def validate(*arguments: Any, dataset: Path, **options: Any) -> Any:
        result = small_steps["validate_data"](*arguments, dataset=dataset, **options)
        (dataset / "profile.json").write_text(json.dumps(profile))
        return result

    for name, step in {**small_steps, "train_qlora": train, "validate_data": validate}.items():
        if name in ("validate_data", "quantize_model", "train_qlora"):
            assert execute.run_step(plan, name, lambda step=step: step).code == 0

    assert past_runs.read_lengths(plan) == RowLengths(27, 270, 270, 11, 12)
    replayed = RowLengths(3, 90, 60, 28, 40)
    assert RowLengths(27, 270, 270, 11, 12).joined(replayed) == RowLengths(30, 360, 330, 28, 40)
    later = planned(device="cpu", precision="float32", rank=32)
    (run,) = past_runs.find_past_runs(later, "cpu")
    assert (run.peak_bytes, run.tokens_per_second, run.train["rank"]) == (9000 * 2**20, 12.5, 16)
    assert past_runs.find_past_runs(later, "cuda") == []
    assert "by the speed of 1 earlier run" in forecast_text.as_text(later)

    # A plan of before a setting was there says nothing of memory, and the estimate does without it.
    def without_format(step: Any) -> Any:
        return step.model_copy(update={"config": {n: v for n, v in step.config.items() if n != "format"}})

    older = plan.model_copy(update={"steps": tuple(map(without_format, plan.steps))})
    monkeypatch.setattr(explain, "newest_plans", lambda store: iter([older]))
    assert past_runs.find_past_runs(later, "cpu") == []
    assert "earlier run" not in forecast_text.as_text(later)
