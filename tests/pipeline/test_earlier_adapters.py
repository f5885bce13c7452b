"""Training goes on from the adapter in production, and averages those of accepted versions; the plan pins both."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qlora_retrain.core import graph, hashing
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import explain, make_plan, planned_steps
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store, registry
from qlora_retrain.storage.registry import Release
from tests.conftest import ticket_rows, write_jsonl

AT = datetime(2026, 1, 31, 3, 0, 0, tzinfo=UTC)
START = "train.start=champion"
SOUP = "merge.soup=3"
Steps = dict[str, Callable[..., StepResult]]


class Line:
    """A line whose steps write small files; each plan has a second of its own."""

    def __init__(self, yaml: Path, root: str, run_all: Callable[[Plan], dict[str, int]]) -> None:
        self.yaml, self.store, self.run_all = yaml, open_store(root), run_all
        self._seconds = itertools.count()

    def plan(self, *overrides: str) -> Plan:
        at = AT + timedelta(seconds=next(self._seconds))
        return Plan.load(make_plan.make_plan(self.yaml, self.store.uri, overrides=overrides, at=at).uri)

    def run(self, *overrides: str) -> Plan:
        plan = self.plan(*overrides)
        assert set(self.run_all(plan).values()) == {0}
        return plan

    def new_data(self, count: int) -> None:
        write_jsonl(self.yaml.parent / "tickets.jsonl", ticket_rows(count))

    def production(self) -> Release:
        alias, _ = registry.read_alias(self.store, "intents", registry.PRODUCTION)
        assert alias is not None
        return registry.read_release(self.store, "intents", alias.version)


@pytest.fixture
def intents(line: Path, root_uri: str, run_all: Callable[[Plan], dict[str, int]]) -> Line:
    return Line(line, root_uri, run_all)


def start_of(plan: Plan) -> str | None:
    key = plan.step("train_qlora").inputs["champion_adapter"]
    assert key == (plan.start.adapter_hash if plan.start else None)
    return plan.start.version if plan.start else None


def test_training_goes_on_from_production_once_there_is_new_data(intents: Line) -> None:
    first = intents.run(START)
    assert start_of(first) is None
    assert "start: a new adapter over the base, since the line has no version in production yet" in explain.as_text(
        first
    )
    v1 = intents.production()

    # The same data and settings would train the same adapter once more, over what it has learnt.
    again = intents.plan(START)
    assert (start_of(again), again.unchanged) == (None, v1.version)
    intents.new_data(40)
    second = intents.run(START)
    assert (start_of(second), second.unchanged) == (v1.version, None)
    assert f"start: the adapter of {v1.version}, the version in production" in explain.as_text(second)
    v2 = intents.production()
    recipe = json.loads(intents.store.read(f"{registry.version_folder('intents', v2.version)}/recipe.json").data)
    assert recipe["start"]["version"] == v1.version

    # Production has another adapter than that with which it was made, and its own start is what counts.
    unchanged = intents.plan(START)
    assert (start_of(unchanged), unchanged.unchanged) == (v1.version, v2.version)
    judged_again = intents.plan(START, "evaluate.confidence=0.9")
    assert judged_again.unchanged is None
    assert judged_again.step("train_qlora").key == second.step("train_qlora").key
    assert "as that of the version in production had" in explain.as_text(judged_again)
    intents.new_data(50)
    assert start_of(intents.plan(START)) == v2.version
    assert start_of(intents.plan(START, "train.learning_rate=1e-4")) == v2.version
    assert start_of(intents.plan()) is None


def test_the_hash_of_the_start_is_that_of_its_adapter_and_profile(intents: Line) -> None:
    intents.run(START)
    intents.new_data(40)
    plan = intents.plan(START)
    release = intents.production()
    files = [f for f in release.files if f.path.startswith("adapter/") or f.path == "data/profile.json"]
    assert plan.start is not None
    assert plan.start.adapter_hash == hashing.content_hash((f.path, f.sha256) for f in files)


def test_the_step_gets_the_adapter_as_it_ships(intents: Line, small_steps: Steps) -> None:
    intents.run(START)
    intents.new_data(40)
    plan = intents.plan(START)
    read: dict[str, bytes] = {}
    plain = small_steps["train_qlora"]

    def train_qlora(champion_adapter: Path, adapter: Path, **inputs: object) -> StepResult:
        read.update({p.relative_to(champion_adapter).as_posix(): p.read_bytes() for p in champion_adapter.rglob("*.*")})
        return plain(champion_adapter=champion_adapter, adapter=adapter, **inputs)

    train_qlora.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    small_steps["train_qlora"] = train_qlora
    assert set(intents.run_all(plan).values()) == {0}
    release = registry.read_release(intents.store, "intents", start_of(plan) or "")
    folder = registry.version_folder("intents", release.version)
    parts = release.parts(*graph.VERSION_PARTS["champion_adapter"])
    assert read == {f.path: intents.store.read(f"{folder}/{f.path}").data for f in parts}


def test_a_version_that_was_rolled_back_is_never_a_start_and_never_averaged(intents: Line) -> None:
    versions = []
    for count in (30, 40, 50):
        intents.new_data(count)
        intents.run(START, SOUP)
        versions.append(intents.production().version)
    registry.rollback(intents.store, "intents", registry.PRODUCTION, reason="bad")
    intents.new_data(60)
    plan = intents.plan(START, SOUP)
    assert start_of(plan) == versions[1]
    assert [adapter.version for adapter in plan.earlier_adapters] == [versions[1], versions[0]]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.method=rslora", "it was trained with another method; set train.method: lora, or train.start: base"),
        ("quantize.format=fp4", "its base was stored in another format; set quantize.format: nf4, or"),
        ("train.target_modules=attention", "its adapter is in other layers; set train.target_modules: all-linear, or"),
        ("train.rank=8", "its adapter has rank 16, and train.rank is 8; set train.rank: 16 or more, or"),
        ("data.split_seed=another", "would evaluate rows that it has learnt; set data.split_seed: intents, or"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_what_to_set(intents: Line, override: str, words: str) -> None:
    intents.run()
    with pytest.raises(UsageError, match=r"train\.start: champion cannot go on from 2026") as refused:
        intents.plan(START, override)
    assert words in str(refused.value)


def test_another_base_model_is_refused(intents: Line) -> None:
    intents.run()
    (intents.yaml.parent / "base" / "model.safetensors").write_text("other weights")
    with pytest.raises(UsageError, match="it was trained over another base model; set"):
        intents.plan(START)


def test_a_larger_rank_goes_on(intents: Line) -> None:
    intents.run()
    assert start_of(intents.plan(START, "train.rank=32")) == intents.production().version


def test_the_last_accepted_adapters_are_averaged_and_enter_the_key_of_the_merge_alone(intents: Line) -> None:
    versions = []
    for count in (30, 40, 50):
        intents.new_data(count)
        intents.run()
        versions.append(intents.production().version)
    # This run's own adapter is not averaged with itself.
    assert [a.version for a in intents.plan(SOUP).earlier_adapters] == [versions[1], versions[0]]
    intents.new_data(60)
    alone, soup = intents.plan(), intents.plan(SOUP)
    assert alone.earlier_adapters == ()
    assert alone.step("merge_adapter").inputs["earlier_adapters"] is None
    assert [adapter.version for adapter in soup.earlier_adapters] == [versions[2], versions[1]]
    keys = [{step.name: step.key for step in plan.steps} for plan in (alone, soup)]
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"merge_adapter", "publish"}
    assert f"soup: this run's adapter with those of {versions[2]}, {versions[1]} (merge.soup: 3)" in explain.as_text(
        soup
    )
    few = intents.plan("merge.soup=9")
    assert len(few.earlier_adapters) == 3
    assert "the line has no more that fit (merge.soup: 9)" in explain.as_text(few)
    # Over another base or in other layers the matrices mean something else.
    for override in ("quantize.format=fp4", "train.target_modules=attention"):
        assert intents.plan(SOUP, override).earlier_adapters == ()
        assert "soup: none: the line has no version that fits (merge.soup: 3)" in explain.as_text(
            intents.plan(SOUP, override)
        )


def test_a_soup_without_new_data_is_unchanged(intents: Line) -> None:
    intents.run(SOUP)
    intents.new_data(40)
    intents.run(SOUP)
    assert intents.plan(SOUP).unchanged == intents.production().version


def test_the_merge_gets_a_folder_for_each_version(intents: Line, small_steps: Steps) -> None:
    for count in (30, 40):
        intents.new_data(count)
        intents.run()
    intents.new_data(50)
    plan = intents.plan(SOUP)
    names: set[str] = set()
    plain = small_steps["merge_adapter"]

    def merge_adapter(earlier_adapters: Path, **inputs: object) -> StepResult:
        names.update(p.relative_to(earlier_adapters).as_posix() for p in earlier_adapters.rglob("*.*"))
        return plain(earlier_adapters=earlier_adapters, **inputs)

    merge_adapter.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    small_steps["merge_adapter"] = merge_adapter
    assert set(intents.run_all(plan).values()) == {0}
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert names >= {f"{adapter.version}/adapter/{file}" for adapter in plan.earlier_adapters for file in files}


def test_a_plan_of_which_the_start_was_taken_away_contradicts_itself(intents: Line) -> None:
    intents.run(START)
    intents.new_data(40)
    plan = intents.plan(START)
    versions = {name: plan.pinned_version(name) for name in graph.VERSION_PARTS}
    others = plan.sources, {**versions, "champion_adapter": None}, plan.history, plan.line, plan.target
    fault = planned_steps.find_contradiction(plan.steps, *others)
    assert fault == "train_qlora.inputs does not follow from its settings and sources"
