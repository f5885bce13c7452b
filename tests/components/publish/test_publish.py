"""The publish step, through the real runner: what a version holds, and what it may never hold or do."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core.errors import IntegrityError, QualityRefused, UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, explain, make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, open_store, pull, registry, rejections
from qlora_retrain.storage.registry import Alias, Rejection
from qlora_retrain.storage.store import Store

Steps = dict[str, Callable[..., StepResult]]
RunAll = Callable[[Plan], dict[str, int]]


@pytest.fixture
def store(root_uri: str) -> Store:
    return open_store(root_uri)


@pytest.fixture
def new_plan(line: Path, root_uri: str) -> Callable[..., Plan]:
    return lambda *overrides: make_plan.make_plan(line, root_uri, overrides=overrides)


def run_until_publish(plan: Plan, steps: Steps) -> None:
    for name in list(steps)[:-1]:
        assert execute.run_step(plan, name, lambda name=name: steps[name]).code == 0  # type: ignore[misc]


def publish(plan: Plan, steps: Steps) -> int:
    return execute.run_step(plan, "publish", lambda: steps["publish"]).code


def version_of_alias(store: Store, alias: str, line: str = "intents") -> str | None:
    state, _ = registry.read_alias(store, line, alias)
    return state.version if state else None


def numbers(store: Store, plan: Plan) -> dict[str, Any]:
    manifest = artifact.find_manifest(store, "release", plan.step("publish").key)
    assert manifest is not None
    return dict(manifest.numbers)


def versions(store: Store) -> list[str]:
    return list(store.children("models/intents/versions"))


def test_a_version_holds_what_a_consumer_needs_each_file_by_its_hash(
    new_plan: Callable[..., Plan], run_all: RunAll, store: Store
) -> None:
    plan = new_plan()
    assert run_all(plan)["publish"] == 0
    (version,) = versions(store)
    release = registry.read_release(store, "intents", version)

    assert {f.path for f in release.files} == {
        "adapter/adapter_config.json",
        "README.md",
        "LICENCE.md",
        "recipe.json",
        "sbom.json",
        "cost.json",
        "model.sig",
        "adapter/adapter_model.safetensors",
        "model/model.safetensors",
        "model/config.json",
        "data/profile.json",
        "training/training.json",
        "evaluation/evaluation.json",
        "evaluation/certificate.json",
        "reports/data.html",
        "reports/training.html",
        "reports/evaluation.html",
        "reports/merge.html",
    }

    folder = registry.version_folder("intents", version)
    for file in release.files:
        data = store.read(f"{folder}/{file.path}").data
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size_bytes, file.sha256)

    assert release.keys == {s.name: s.key for s in plan.steps}
    assert (release.adapter_key, release.judgement) == (plan.step("train_qlora").key, plan.judgement)


def test_a_version_carries_every_form_of_the_model_and_so_does_its_name(
    new_plan: Callable[..., Plan], small_steps: Steps, store: Store, tmp_path: Path
) -> None:
    plain = small_steps["merge_adapter"]

    @functools.wraps(plain)
    def merge_adapter(model: Path, **others: Any) -> StepResult:
        (model / "exports/gguf-q8_0").mkdir(parents=True)
        (model / "exports/gguf-q8_0/model-q8_0.gguf").write_bytes(b"GGUF")
        report: StepResult = plain(model=model, **others)
        return report

    plan = new_plan()
    run_until_publish(plan, {**small_steps, "merge_adapter": merge_adapter})
    assert publish(plan, small_steps) == 0
    pulled = tmp_path / "pulled"
    release = pull.pull(store, "intents@production", pulled)
    assert (pulled / "model/exports/gguf-q8_0/model-q8_0.gguf").read_bytes() == b"GGUF"
    content = sorted((f.path, f.sha256) for f in release.files if f.path.startswith(("adapter/", "model/")))
    assert "model/exports/gguf-q8_0/model-q8_0.gguf" in dict(content)
    assert release.content_hash == hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    # The next run compares with the form that is judged, and need not fetch the others.
    champion_files: list[str] = []

    def evaluate(
        config: Any,
        dataset: Path,
        base_model: Path,
        base_nf4: Path,
        adapter: Path,
        champion: Path | None,
        anchor: Path | None,
        golden_data: Path | None,
        reference_data: Path | None,
        evaluation: Path,
    ) -> StepResult:
        assert champion is not None
        champion_files.extend(
            sorted(path.relative_to(champion).as_posix() for path in champion.rglob("*") if path.is_file())
        )
        return StepResult()

    later = new_plan("train.learning_rate=1e-3")
    for name in ("validate_data", "quantize_model", "train_qlora"):
        assert execute.run_step(later, name, lambda name=name: small_steps[name]).code == 0  # type: ignore[misc]
    assert execute.run_step(later, "evaluate", lambda: evaluate).code == 0
    assert [path for path in champion_files if path.startswith("model/")] == [
        "model/config.json",
        "model/model.safetensors",
    ]


@pytest.mark.parametrize(
    ("made_by", "path", "data"),
    [
        ("merge_adapter", "modeling.py", b"import os"),
        ("train_qlora", "optimizer.pt", b"a pickle"),
        ("merge_adapter", "exports/nf4/x.npz", b"a pickle"),
        ("merge_adapter", ".hidden.json", b"{}"),
        ("merge_adapter", "config.json", b'{"text_config": {"auto_map": {"AutoConfig": "x.Y"}}}'),
        ("merge_adapter", "exports/nf4/generation_config.json", b'[{"a": [{"auto_map": "x.Y"}]}]'),
        ("train_qlora", "adapter_config.json", b"[" * 10**5),
        ("merge_adapter", "processor_config.json", b" " * (8 * 2**20 + 1)),
    ],
)
def test_a_file_that_no_version_may_have_is_not_published(
    new_plan: Callable[..., Plan], small_steps: Steps, store: Store, made_by: str, path: str, data: bytes
) -> None:
    plain, output = small_steps[made_by], {"merge_adapter": "model", "train_qlora": "adapter"}[made_by]

    @functools.wraps(plain)
    def step(**arguments: Any) -> StepResult:
        result: StepResult = plain(**arguments)
        (arguments[output] / path).parent.mkdir(parents=True, exist_ok=True)
        (arguments[output] / path).write_bytes(data)
        return result

    plan = new_plan()
    run_until_publish(plan, {**small_steps, made_by: step})
    assert publish(plan, small_steps) == 13
    assert version_of_alias(store, "latest") is version_of_alias(store, "production") is None
    assert not [path for path in store.list("models") if path.path.endswith("manifest.json")]


def test_a_version_has_the_adapter_that_was_merged(
    new_plan: Callable[..., Plan], small_steps: Steps, store: Store
) -> None:
    plain = small_steps["merge_adapter"]

    @functools.wraps(plain)
    def cut(**arguments: Any) -> StepResult:
        result: StepResult = plain(**arguments)
        (arguments["model"] / "adapter").mkdir()
        (arguments["model"] / "adapter/adapter_model.safetensors").write_bytes(b"the cut one")
        (arguments["model"] / "adapter/adapter_config.json").write_text('{"r": 4}')
        return StepResult({**result.numbers, "base": "dequantized", "rank": 4, "strength": 0.7})

    plan = new_plan()
    steps = {**small_steps, "merge_adapter": cut}
    run_until_publish(plan, steps)
    assert publish(plan, steps) == 0
    (version,) = versions(store)
    release = registry.read_release(store, "intents", version)
    paths = [f.path for f in release.files if f.path.startswith(("adapter/", "model/"))]
    assert paths == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "model/config.json",
        "model/model.safetensors",
    ]
    folder = registry.version_folder("intents", version)
    assert store.read(f"{folder}/adapter/adapter_model.safetensors").data == b"the cut one"
    card = store.read(f"{folder}/README.md").data.decode()
    assert "merged into the dequantized base with rank 4 at strength 0.7; `adapter/` holds it in this form." in card
    content = sorted((f.path, f.sha256) for f in release.files if f.path.startswith(("adapter/", "model/")))
    expected = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    assert release.content_hash == expected


def test_a_version_is_named_by_the_plans_time_and_its_content(
    new_plan: Callable[..., Plan], run_all: RunAll, store: Store
) -> None:
    plan = new_plan()
    run_all(plan)
    (version,) = versions(store)
    release = registry.read_release(store, "intents", version)
    content = sorted((f.path, f.sha256) for f in release.files if f.path.startswith(("adapter/", "model/")))
    expected = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    assert release.content_hash == expected
    assert version == f"{plan.created_at}-{expected[:12]}"


def test_the_same_content_again_is_the_same_version(
    new_plan: Callable[..., Plan], run_all: RunAll, store: Store
) -> None:
    run_all(new_plan())
    # Another confidence judges anew, so the run is not `unchanged`; the adapter and the model stay the same.
    again = new_plan("evaluate.confidence=0.9")
    assert again.unchanged is None
    assert run_all(again)["publish"] == 0
    assert len(versions(store)) == 1
    assert numbers(store, again)["published"] is False
    assert numbers(store, again)["moved"] is False


def test_publish_offers_latest_and_moves_the_alias_it_is_told(
    new_plan: Callable[..., Plan], run_all: RunAll, store: Store
) -> None:
    plan = new_plan("publish.promote_to=staging")
    run_all(plan)
    (version,) = versions(store)

    assert (
        version_of_alias(store, "latest"),
        version_of_alias(store, "staging"),
        version_of_alias(store, "production"),
    ) == (version, version, None)
    assert numbers(store, plan)["promoted_to"] == "staging"


def test_without_an_alias_only_latest_moves(new_plan: Callable[..., Plan], run_all: RunAll, store: Store) -> None:
    plan = new_plan("publish.promote_to=null")
    assert run_all(plan)["publish"] == 0
    assert version_of_alias(store, "latest") == versions(store)[0]
    assert version_of_alias(store, "production") is None
    assert numbers(store, plan)["moved"] is False


def test_publish_refuses_a_failed_evaluation(
    new_plan: Callable[..., Plan], small_steps: Steps, run_all: RunAll, store: Store
) -> None:
    passing = small_steps["evaluate"]

    def evaluate(
        config: Any,
        dataset: Path,
        base_model: Path,
        base_nf4: Path,
        adapter: Path,
        champion: Path | None,
        anchor: Path | None,
        golden_data: Path | None,
        reference_data: Path | None,
        evaluation: Path,
    ) -> StepResult:
        inputs = (dataset, base_model, base_nf4, adapter, champion, anchor, golden_data, reference_data)
        return StepResult(passing(config, *inputs, evaluation).numbers, refused=QualityRefused("it is worse"))

    plan = new_plan()
    small_steps["evaluate"] = evaluate
    assert run_all(plan)["evaluate"] == 11
    assert execute.run_step(plan, "merge_adapter", lambda: small_steps["merge_adapter"]).code == 11
    # The merge did not run, so there is no model to publish.
    assert publish(plan, small_steps) in (11, 75)
    assert versions(store) == []
    assert version_of_alias(store, "latest") is None


def test_publish_refuses_a_failed_merge(new_plan: Callable[..., Plan], small_steps: Steps, store: Store) -> None:
    passing = small_steps["merge_adapter"]

    def merge_adapter(
        config: Any,
        dataset: Path,
        base_model: Path,
        base_nf4: Path,
        adapter: Path,
        evaluation: Path,
        reference_data: Path | None,
        earlier_adapters: Path | None,
        model: Path,
    ) -> StepResult:
        passing(config, dataset, base_model, base_nf4, adapter, evaluation, reference_data, earlier_adapters, model)
        return StepResult(refused=QualityRefused("merging costs too much"))

    plan = new_plan()
    for name in ("validate_data", "quantize_model", "train_qlora", "evaluate"):
        assert execute.run_step(plan, name, lambda name=name: small_steps[name]).code == 0  # type: ignore[misc]
    assert execute.run_step(plan, "merge_adapter", lambda: merge_adapter).code == 11
    assert publish(plan, small_steps) == 11
    assert versions(store) == []


def test_an_alias_that_moved_since_the_plan_means_try_again(
    new_plan: Callable[..., Plan], small_steps: Steps, run_all: RunAll, store: Store
) -> None:
    slow = new_plan("train.learning_rate=1e-3")
    run_until_publish(slow, small_steps)
    # A second run of the line publishes before the first one does.
    assert run_all(new_plan("train.learning_rate=2e-3"))["publish"] == 0
    faster = version_of_alias(store, "production")
    assert publish(slow, small_steps) == 75
    assert version_of_alias(store, "production") == faster


def test_content_that_was_rolled_back_is_refused_until_a_person_overrides(
    new_plan: Callable[..., Plan], run_all: RunAll, store: Store
) -> None:
    run_all(new_plan("train.learning_rate=1e-3"))
    first = version_of_alias(store, "production")
    run_all(new_plan("train.learning_rate=2e-3"))
    bad = version_of_alias(store, "production")

    assert bad is not None
    registry.rollback(store, "intents", "production", reason="it swears")
    again = new_plan("train.learning_rate=2e-3")

    assert run_all(again)["publish"] == 11
    assert version_of_alias(store, "production") == first
    assert (numbers(store, again)["moved"], numbers(store, again)["promoted_to"]) == (False, None)

    release = registry.read_release(store, "intents", bad)
    assert registry.move_alias(store, "intents", "production", release, reason="a person looked", override=True)
    assert version_of_alias(store, "production") == bad


def test_nothing_published_names_a_place_or_a_secret(
    new_plan: Callable[..., Plan], run_all: RunAll, store: Store, line: Path, root_uri: str, tmp_path: Path
) -> None:
    run_all(new_plan())
    for entry in store.list("models"):
        if "/versions/" in entry.path:
            text = store.read(entry.path).data.decode()
            assert str(tmp_path) not in text, entry.path
            assert root_uri not in text, entry.path
            assert not re.search(r"(file|s3)://", text), entry.path


def test_the_recipe_holds_every_identity_field_and_content_pin(
    new_plan: Callable[..., Plan], run_all: RunAll, store: Store
) -> None:
    plan = new_plan("train.learning_rate=1e-4")
    run_all(plan)
    recipe = json.loads(store.read(f"models/intents/versions/{versions(store)[0]}/recipe.json").data)

    assert recipe["steps"] == {s.name: s.identity for s in plan.steps}
    assert recipe["steps"]["train_qlora"]["learning_rate"] == 0.0001
    pinned = plan.sources["base_model"]

    assert pinned is not None
    assert recipe["sources"]["base_model"] == {f.path: f.pin for f in pinned.files}
    assert recipe["sources"]["golden_data"] is None


def test_the_model_card_tells_the_verdict_and_the_licence(
    new_plan: Callable[..., Plan], run_all: RunAll, store: Store
) -> None:
    run_all(new_plan("publish.licence=Apache-2.0", "publish.description=Sorts tickets."))
    card = store.read(f"models/intents/versions/{versions(store)[0]}/README.md").data.decode()
    assert "license: apache-2.0" in card
    assert "Sorts tickets." in card
    assert "**Verdict:** The challenger may ship" in card
    assert "| gain over base | 0.3 | 0.2 to 0.4 | 0 | yes |" in card


def test_the_sbom_lists_every_pinned_package_and_the_base(
    new_plan: Callable[..., Plan], run_all: RunAll, store: Store
) -> None:
    run_all(new_plan())
    sbom = json.loads(store.read(f"models/intents/versions/{versions(store)[0]}/sbom.json").data)
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.5")
    versions_by_name = {c["name"]: c["version"] for c in sbom["components"]}
    assert versions_by_name["torch"] == "2.13.0"
    assert "base_model" in versions_by_name


@pytest.mark.parametrize("fault", ["missing", "changed"])
def test_an_evaluation_that_is_not_as_it_was_made_is_refused(
    new_plan: Callable[..., Plan], small_steps: Steps, store: Store, tmp_path: Path, fault: str
) -> None:
    plan = new_plan()
    run_until_publish(plan, small_steps)
    manifest = artifact.find_manifest(store, "evaluation", plan.step("evaluate").key)

    assert manifest is not None
    path = tmp_path / "store" / manifest.prefix / "evaluation.json"
    text = path.read_text()
    path.unlink() if fault == "missing" else path.write_text(text.replace("pass", "fail"))

    assert publish(plan, small_steps) == 13
    assert versions(store) == []


def flip_a_byte(store: Store, path: str) -> None:
    """Change one byte in place, as a failing disk or a hostile writer does; the size stays."""
    file = Path(store.uri.removeprefix("file://")) / path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("step", "artifact_name", "path"),
    [
        ("train_qlora", "adapter", "adapter_model.safetensors"),
        ("merge_adapter", "model", "model.safetensors"),
        ("evaluate", "evaluation", "evaluation.json"),
        ("validate_data", "dataset", "profile.json"),
    ],
)
def test_a_byte_that_changed_in_an_artifact_after_its_gate_is_not_published(
    new_plan: Callable[..., Plan], small_steps: Steps, store: Store, step: str, artifact_name: str, path: str
) -> None:
    plan = new_plan()
    run_until_publish(plan, small_steps)
    manifest = artifact.find_manifest(store, artifact_name, plan.step(step).key)
    assert manifest is not None
    flip_a_byte(store, f"{manifest.prefix}/{path}")

    assert publish(plan, small_steps) == 13
    assert not list(store.children("models/intents/aliases"))
    for version in versions(store):
        with pytest.raises(UsageError, match="has no version"):
            registry.read_release(store, "intents", version)


def test_a_version_of_before_whose_bytes_changed_is_mended_from_its_artifacts_or_gets_no_alias(
    new_plan: Callable[..., Plan], run_all: RunAll, store: Store
) -> None:
    run_all(new_plan("publish.promote_to=null"))
    (version,) = versions(store)
    release = registry.read_release(store, "intents", version)
    path = f"models/intents/versions/{version}/{release.files[0].path}"

    # By a run that makes the same content again.
    flip_a_byte(store, path)
    assert run_all(new_plan("evaluate.confidence=0.9"))["publish"] == 0
    registry.verify_version(store, release)

    # By hand, when the artifacts are gone.
    flip_a_byte(store, path)
    store.delete([entry.path for entry in store.list("artifacts")])
    with pytest.raises(IntegrityError, match=rf"{release.files[0].path}: its sha256 differs, and no artifact"):
        registry.move_alias(store, "intents", "staging", release, reason="by hand")
    assert version_of_alias(store, "staging") is None


def reject_by_name(store: Store, version: str) -> None:
    """Reject a version for production whose manifest was lost."""
    rejection = Rejection(version=version, content_hash=None, reason="another", actor="a test", at="2026-01-01")

    def next_state(state: Alias | None) -> Alias | None:
        assert state is not None
        return registry.stamped(rejections.add(state, rejection), state, "reject", "another", "a test")

    registry.change_alias(store, "intents", "production", next_state)


def test_a_rejected_recipe_stays_rejected_whatever_bytes_a_retraining_gives(
    new_plan: Callable[..., Plan], run_all: RunAll, small_steps: Steps, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(new_plan("train.learning_rate=1e-3"))
    run_all(new_plan("train.learning_rate=2e-3"))
    bad = version_of_alias(store, "production")
    registry.rollback(store, "intents", "production", reason="it swears")

    # The artifact is gone, and training does not repeat itself to the byte.
    again = new_plan("train.learning_rate=2e-3")
    note = next(text for text in explain.as_text(again).split("\n") if text.startswith("rejected for production"))
    assert f"{bad}, by os:" in note
    assert "(it swears); this run has the same recipe" in note
    artifact.drop(store, "adapter", again.step("train_qlora").key)
    train = small_steps["train_qlora"]

    def train_otherwise(*arguments: Any, **options: Any) -> StepResult:
        result = train(*arguments, **options)
        (options["adapter"] / "adapter_model.safetensors").write_text("other bytes")
        return result

    with monkeypatch.context() as patch:
        patch.setitem(small_steps, "train_qlora", functools.wraps(train)(train_otherwise))
        assert run_all(again)["publish"] == 11
    manifest = artifact.find_manifest(store, "release", again.step("publish").key)
    assert manifest is not None
    assert manifest.numbers["version"] != bad
    assert f"{bad}, which the same recipe made, was rejected for production by os:" in str(manifest.reason)

    # Another recipe may ship, and the plan says what is other.
    changed = new_plan("train.learning_rate=3e-3")
    assert "this run may be promoted, since it differs: train_qlora.learning_rate: 0.002 -> 0.003" in explain.as_text(
        changed
    )
    assert run_all(changed)["publish"] == 0

    # Rejections that came later hide none that holds for a run.
    for number in range(3):
        reject_by_name(store, f"2026010{number + 1}T000000Z-{'0' * 12}")
    assert "(it swears); this run has the same recipe" in explain.as_text(new_plan("train.learning_rate=2e-3"))
    unpromoted = new_plan("train.learning_rate=2e-3", "publish.promote_to=null")
    assert "(it swears); this run has the same recipe, and promotes nothing" in explain.as_text(unpromoted)
