"""The merge step chooses base, rank and strength by one half of rows and passages, and certifies on the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from components.evaluate.step import run as evaluate
from components.merge_adapter import adapter_forms, halves
from components.merge_adapter.candidates import MAX_FORMS
from components.merge_adapter.merge import merge
from components.merge_adapter.step import run
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.core.errors import Exit, UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.evaluation import reference_text, scoring
from qlora_retrain.evaluation.scoring import RowScore
from qlora_retrain.lm import chat, loading

# No answers are generated, and the limits on the task are wide: these tests are about what is chosen.
RULES = EvaluateConfig(
    allow_first_release=True, bootstrap_samples=200, device="cpu", stop_rows=0, intruder_top_k=2, intruder_epsilon=0.9
)
CONFIG = MergeConfig(device="cpu", min_prompts=18, max_loss_increase_nats=50.0)
PASSAGES = [f"There are {n} apples and {n + 3} pears in the basket." for n in range(40)]

Merge = Callable[..., tuple[StepResult, dict[str, Any], Path]]


@pytest.fixture(scope="module")
def merge_line(
    tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path, write_dataset: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Merge:  # fmt: skip
    """Return a function that merges a line with 40 passages, under a limit on forgetting."""
    work = tmp_path_factory.mktemp("line")
    reference, evaluation = work / "reference", work / "evaluation"
    reference.mkdir()
    evaluation.mkdir()
    (reference / "general.txt").write_text("\n\n".join(PASSAGES))
    inputs = {
        "dataset": write_dataset(work / "dataset"),
        "base_model": tiny_model,
        "base_nf4": tiny_nf4,
        "adapter": tiny_adapter,
        "reference_data": reference,
    }
    evaluate(RULES, **inputs, champion=None, anchor=None, golden_data=None, evaluation=evaluation)

    def merge_with(
        limit: float | str | None, config: MergeConfig, limit_accuracy: float | None = None, **others: Path
    ) -> Any:
        document = json.loads((evaluation / "evaluation.json").read_text())
        document["settings"] |= {"max_forgetting_nats": limit, "max_forgetting_accuracy": limit_accuracy}
        (evaluation / "evaluation.json").write_text(json.dumps(document))
        model = tmp_path_factory.mktemp("merged") / "model"
        model.mkdir()
        result = run(config, **{**inputs, **others}, evaluation=evaluation, model=model)
        return result, json.loads((model / "certificate.json").read_text()), model

    merge_with.inputs = inputs | {"evaluation": evaluation}  # type: ignore[attr-defined]
    return merge_with


@pytest.fixture(scope="module")
def tried(merge_line: Merge) -> tuple[StepResult, dict[str, Any], Path]:
    """A merge that tries every rank and every strength, because no strength stays within the limit."""
    config = CONFIG.model_copy(update={"base": "measured", "rank": "smallest", "max_rank_loss_nats": 0.5})
    return merge_line(1e-6, config)


def by_form(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {candidate["form"]: candidate for candidate in document["candidates"]}


def test_a_line_where_no_strength_stays_within_the_limit_is_refused_with_the_curve(
    tried: tuple[StepResult, dict[str, Any], Path],
) -> None:
    result, document, model = tried
    assert result.refused is not None
    assert result.refused.exit_code == Exit.QUALITY_REFUSED
    assert "no strength stays within the limits on forgetting on the 20 passages that choose" in str(result.refused)
    curve = {c["strength"]: c for c in document["candidates"] if c["forgetting"] and c["rank"] == document["rank"]}
    assert list(curve) == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert f"strength 0.6: loss {curve[0.6]['loss']:.4f}, forgot" in str(result.refused)
    # A weaker adapter forgets less, in this model as in others.
    forgotten = [c["forgetting"]["forgetting"]["value"] for c in curve.values() if not c["reduced_intruders"]]
    assert forgotten == sorted(forgotten, reverse=True)
    page = (model / "report.html").read_text()
    assert "What a smaller rank costs" in page
    assert "What a weaker adapter costs, and what it forgets" in page
    assert page.count("<svg") == 2


def test_the_smallest_rank_that_costs_little_ships_with_its_adapter(
    tried: tuple[StepResult, dict[str, Any], Path], merge_line: Merge, tmp_path: Path
) -> None:
    result, document, model = tried
    base = document["base"]
    cut = [c for c in document["candidates"] if c["base"] == base and c["strength"] == 1 and not c["reduced_intruders"]]
    losses = {c["rank"]: c["loss"] for c in cut}
    ranks = [8, 4, 2, 1]
    assert list(losses) == ranks
    assert document["rank"] == min(rank for rank in ranks if losses[rank] <= losses[8] + 0.5)
    assert (result.numbers["base"], result.numbers["rank"]) == (base, document["rank"])

    # The loss of one rank, by a merge of its own, on the rows that select.
    inputs = merge_line.inputs  # type: ignore[attr-defined]
    adapter_forms.cut(inputs["adapter"], tmp_path / "cut", 2)
    (tmp_path / "merged").mkdir()
    merge(inputs["base_model"], inputs["base_nf4"], tmp_path / "cut", tmp_path / "merged",
          dequantized=base == "dequantized", max_shard_gib=5.0)  # fmt: skip
    rows = scoring.read_rows(inputs["dataset"] / "eval.jsonl", "eval")
    labels = json.loads((inputs["dataset"] / "dataset.json").read_text())["labels"]
    loaded, tokenizer = (
        loading.load_base(tmp_path / "merged", dtype="float32"),
        chat.load_tokenizer(tmp_path / "merged"),
    )
    scores = scoring.score_rows(loaded, tokenizer, rows, labels=labels, batch_tokens=4096, description="x")
    selected = [s for s in scores if s.id in halves.split_rows(rows).selection]
    assert losses[2] == pytest.approx(sum(s.loss_nats for s in selected) / sum(s.tokens for s in selected), rel=1e-5)

    # What lies in the artifact is the adapter that was merged.
    config = json.loads((model / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (document["rank"], document["rank"])
    assert sorted(path.name for path in model.iterdir() if path.is_dir()) == ["adapter"]


def test_the_strongest_form_within_the_limit_ships_or_the_one_that_costs_less(
    tried: tuple[StepResult, dict[str, Any], Path], merge_line: Merge
) -> None:
    curve = [c for c in tried[1]["candidates"] if c["rank"] == tried[1]["rank"] and not c["reduced_intruders"]]
    upper = {c["strength"]: c["forgetting"]["forgetting"]["high"] for c in curve}
    config = CONFIG.model_copy(update={"base": tried[1]["base"], "rank": tried[1]["rank"]})
    # Strengths of 0.7 and less stay within this limit.
    limit = (upper[0.7] + upper[0.8]) / 2
    result, document, model = merge_line(limit, config)

    candidates = by_form(document)
    within = {name: c["loss"] for name, c in candidates.items() if c["forgetting"]["forgetting"]["high"] <= limit}
    # No strength is tried below the first one that stays within the limit.
    strengths = [c["strength"] for c in candidates.values() if not c["reduced_intruders"]]
    assert strengths[-4:] == [1.0, 0.9, 0.8, 0.7]
    assert {candidates[name]["strength"] for name in within} - {1.0} == {0.7}
    assert document["form"] == min(within, key=lambda name: within[name])
    assert "has the least loss" in document["why"]
    assert result.numbers["strength"] == document["strength"]

    # The rule is applied to the other half of the passages, in the model that ships.
    inputs = merge_line.inputs  # type: ignore[attr-defined]
    loaded, tokenizer = loading.load_base(model, dtype="float32"), chat.load_tokenizer(model)
    ours = scoring.score_passages(loaded, tokenizer, PASSAGES, batch_tokens=4096, max_tokens=64, description="x")
    base = [s for s in scoring.read_scores(inputs["evaluation"] / "scores.jsonl")["base"] if s.suite == "reference"]
    part = halves.split_passages(ours)
    assert len(part.certification) == 20
    pairs = [(a, b) for a, b in zip(ours, base, strict=True) if a.id in part.certification]
    lost = sum(a.loss_nats - b.loss_nats for a, b in pairs) / sum(a.tokens for a, _ in pairs)
    rule = next(rule for rule in document["rules"] if rule["name"] == "forgetting")
    assert rule["value"] == pytest.approx(lost, rel=1e-4)


def test_a_model_within_the_limit_ships_as_it_was_trained_and_nothing_else_is_built(merge_line: Merge) -> None:
    result, document, model = merge_line(100.0, CONFIG)
    assert result.refused is None
    assert (document["rank"], document["strength"], result.numbers["forms_built"]) == (8, 1.0, 2)
    assert document["form"] == document["base"]
    assert (
        "full strength, which stays within the limits on forgetting on the 20 passages that choose" in document["why"]
    )
    assert not [path for path in model.iterdir() if path.is_dir()]


def test_rank_and_strength_that_are_set_hold_for_every_export(merge_line: Merge) -> None:
    config = CONFIG.model_copy(
        update={"base": "original", "exports": ["bf16", "nf4"], "max_export_loss_increase_nats": None}
    )
    _, document, model = merge_line(None, config.model_copy(update={"rank": 2, "strength": 0.5}))
    assert (document["form"], document["rank"], document["strength"]) == ("original, rank 2, strength 0.5", 2, 0.5)
    assert document["why"].endswith("rank 2 of 8, as merge.rank sets it; strength 0.5, as merge.strength sets it")

    # The adapter that ships, merged as it is, gives the same files.
    _, _, again = merge_line(None, config, adapter=model / "adapter")
    for name in ("model.safetensors", "exports/nf4/model.safetensors"):
        assert (model / name).read_bytes() == (again / name).read_bytes()
    assert not (again / "adapter").exists()


def test_a_rank_above_the_adapters_is_refused(merge_line: Merge) -> None:
    with pytest.raises(UsageError, match=r"merge\.rank: 16 is more than the adapter has, which is 8"):
        merge_line(None, CONFIG.model_copy(update={"base": "dequantized", "rank": 16}))


@pytest.mark.slow
def test_no_run_builds_more_forms_than_it_may(merge_line: Merge, tmp_path: Path) -> None:
    """A rank of 64 has six smaller ones; with the bases and the strengths that would be fourteen forms."""
    base = loading.load_nf4(merge_line.inputs["base_nf4"], dtype="float32")  # type: ignore[attr-defined]
    torch.manual_seed(1)
    lora = get_peft_model(base, LoraConfig(r=64, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    lora.save_pretrained(tmp_path / "adapter")
    config = CONFIG.model_copy(update={"base": "measured", "rank": "smallest"})
    # So few tokens never show that no right one was lost, so no strength stays within this limit.
    result, document, _ = merge_line(None, config, limit_accuracy=1e-9, adapter=tmp_path / "adapter")
    assert result.numbers["forms_built"] == len(document["candidates"]) == MAX_FORMS
    ranks = {c["rank"] for c in document["candidates"]}
    assert ranks == {64, 32, 16, 8, 4}
    assert sum(c["reduced_intruders"] for c in document["candidates"]) == 1


def test_passages_are_halved_by_their_prompts_however_they_are_ordered() -> None:
    chats = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {n}"}]
        for i in range(20)
        for n in range(3)
    ]
    scores = [
        RowScore(reference_text.passage_id(p), "reference", 1.0, 3, prompt_id=reference_text.prompt_id(p))
        for p in [*chats, *PASSAGES]
    ]
    part = halves.split_passages(scores)
    assert not part.selection & part.certification
    assert part.selection | part.certification == {score.id for score in scores}
    assert halves.split_passages(scores[::-1]) == part
    prompts = {score.id: score.prompt for score in scores}
    assert not {prompts[i] for i in part.selection} & {prompts[i] for i in part.certification}
    assert len({prompts[i] for i in part.selection}) == 30
    # Another answer to a question stays on the side of the question.
    second_answer = replace(scores[0], id="0" * 16)
    assert (second_answer.id in halves.split_passages([*scores, second_answer]).selection) is (
        scores[0].id in part.selection
    )
