"""A version holds the parts that its line names; its adapter names its base; its cost is that of all its steps."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.config.line import load
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, make_plan, run_page
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, pull, registry, version_parts
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

Steps = dict[str, Callable[..., StepResult]]


@pytest.fixture
def publish(line: Path, root_uri: str, small_steps: Steps, store: Store) -> Callable[..., tuple[Plan, Release]]:
    """Run the line with settings, whose merge makes an export; return the plan and the version in production."""
    plain = small_steps["merge_adapter"]

    @functools.wraps(plain)
    def merge_adapter(model: Path, **others: Any) -> StepResult:
        (model / "exports/gguf-q8_0").mkdir(parents=True)
        (model / "exports/gguf-q8_0/model-q8_0.gguf").write_bytes(b"GGUF")
        return plain(model=model, **others)

    def run(*overrides: str) -> tuple[Plan, Release]:
        plan = make_plan.make_plan(line, root_uri, overrides=overrides)
        for name, step in {**small_steps, "merge_adapter": merge_adapter}.items():
            assert execute.run_step(plan, name, lambda step=step: step).code == 0
        state, _ = registry.read_alias(store, "intents", "production")
        assert state is not None
        return plan, registry.read_release(store, "intents", state.version)

    return run


def folders(release: Release) -> set[str]:
    """The parts of a version, by the folders of their files."""
    paths = [file.path for file in release.files if file.path.startswith(("adapter/", "model/"))]
    return {"exports" if path.startswith("model/exports/") else path.partition("/")[0] for path in paths}


def test_a_version_holds_the_parts_that_its_line_names(publish: Callable[..., tuple[Plan, Release]]) -> None:
    for parts in ({"adapter", "model", "exports"}, {"adapter", "model"}, {"model", "exports"}):
        _, release = publish(f"publish.parts=[{', '.join(sorted(parts))}]")
        assert folders(release) == parts
    with pytest.raises(UsageError, match="has no part adapter; it has exports/gguf-q8_0, model"):
        version_parts.select(release, ["adapter"])


def test_an_adapter_names_its_base_so_that_loaders_find_it(
    publish: Callable[..., tuple[Plan, Release]], store: Store, tmp_path: Path
) -> None:
    _, release = publish("publish.base_model_id=acme/base")
    pull.pull(store, f"intents@{release.version}", tmp_path / "pulled")
    config = json.loads((tmp_path / "pulled/adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/base", None)
    # The content that a rollback would reject is that of the file which is published.
    _, again = publish("publish.base_model_id=acme/base", "publish.description=Another one.")
    assert again.version == release.version
    _, renamed = publish("publish.base_model_id=acme/other")
    assert renamed.content_hash != release.content_hash
    # A folder beside the consumer's program, and not one of this machine, where the base has no public name.
    _, local = publish()
    pull.pull(store, f"intents@{local.version}", tmp_path / "local")
    config = json.loads((tmp_path / "local/adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("./base_model", None)


def test_the_cost_of_a_version_has_the_steps_of_earlier_runs(
    publish: Callable[..., tuple[Plan, Release]], store: Store
) -> None:
    first, release = publish()
    folder = registry.version_folder("intents", release.version)
    costs = json.loads(store.read(f"{folder}/cost.json").data)
    assert list(costs["steps"]) == ["validate_data", "quantize_model", "train_qlora", "evaluate", "merge_adapter"]
    assert {step["run_id"] for step in costs["steps"].values()} == {first.run_id}
    assert costs["this_run"] == costs["version"]
    assert costs["version"]["peak_memory_mib"] > 10
    assert (costs["version"]["gpu_seconds"], costs["version"]["energy_wh"], costs["energy_measured"]) == (0, None, [])
    assert '"costs"' not in json.dumps(release.provenance)

    second, later = publish("train.learning_rate=1e-3")
    folder = registry.version_folder("intents", later.version)
    costs = json.loads(store.read(f"{folder}/cost.json").data)
    runs = {name: step["run_id"] for name, step in costs["steps"].items()}
    assert runs["validate_data"] == runs["quantize_model"] == first.run_id
    assert {runs[name] for name in ("train_qlora", "evaluate", "merge_adapter")} == {second.run_id}
    assert "| this run | 3 of 5 steps |" in store.read(f"{folder}/README.md").data.decode()
    # The run says the same of itself.
    manifest = artifact.find_manifest(store, "release", second.step("publish").key)
    assert manifest is not None
    assert manifest.numbers["version_seconds"] == costs["version"]["seconds"]
    assert manifest.numbers["run_peak_memory_mib"] == costs["this_run"]["peak_memory_mib"]
    page = run_page.page(second)
    assert "4 of 6 steps" in page  # with publish itself, which is done now


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["publish.parts=[exports]"], "name each part once, and adapter or model among them"),
        (["publish.parts=[adapter, adapter]"], "name each part once"),
        (["publish.parts=[adapter]", "train.method=full", "quantize.format=none"], "add model"),
        (["publish.parts=[adapter]", "train.method=loftq"], "also corrects the packed base of its run"),
        (["publish.parts=[adapter, model]", "merge.exports=[bf16, gguf-q8_0]"], "add exports to publish.parts"),
        (["publish.parts=[model]", "train.method=prompt"], "cannot be merged into a model; add adapter"),
        (["publish.parts=[model]", "merge.soup=2"], "which merge.soup: 2 needs of earlier versions; add adapter"),
        (["publish.parts=[model]", "train.start=champion"], "which train.start: champion needs"),
    ],
)
def test_parts_that_cannot_ship_are_refused_by_name(line: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        load(line, settings)


def test_the_plan_says_what_ships_and_nobody_else_does(line: Path, root_uri: str) -> None:
    plan = make_plan.make_plan(line, root_uri, overrides=["publish.parts=[adapter]"])
    assert plan.step("merge_adapter").identity["ships_model"] is False
    with pytest.raises(UsageError, match=r"the plan sets it by publish\.parts; leave it out"):
        make_plan.make_plan(line, root_uri, overrides=["merge.ships_model=false"])
