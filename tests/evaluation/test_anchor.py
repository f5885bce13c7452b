"""Check the anchor, the line's best version so far: how releases pass it on, and how plan and rules use it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules import suite_rules
from qlora_retrain.evaluation.verdict import apply_rules
from qlora_retrain.pipeline import execute, make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import registry
from qlora_retrain.storage.store import Store

RunAll = Callable[[Plan], dict[str, int]]


@pytest.fixture
def publish_next(
    line: Path, root_uri: str, run_all: RunAll, small_steps: dict[str, Any]
) -> Callable[[str | None], Plan]:
    """Return a function that publishes one more version; the certificate names `best` as the best contestant."""
    small_evaluate, small_merge = small_steps["evaluate"], small_steps["merge_adapter"]
    count = 0

    def publish(best: str | None) -> Plan:
        nonlocal count, small_steps
        count += 1
        plan = make_plan.make_plan(line, root_uri, overrides=[f"train.learning_rate={count / 1000}"])

        @functools.wraps(small_evaluate)
        def evaluate(champion: Path | None, anchor: Path | None, **inputs: Any) -> StepResult:
            folders = {"champion": champion, "anchor": anchor}
            assert {name for name, folder in folders.items() if folder} == {
                name for name in folders if plan.pinned_version(name)
            }
            for folder in filter(None, folders.values()):
                assert (folder / "model" / "config.json").is_file()
            # Only what is read is fetched: of the champion also its profile, of the anchor the model alone.
            assert champion is None or (champion / graph.PROFILE_PATH).is_file()
            assert anchor is None or not (anchor / graph.PROFILE_PATH).exists()
            report: StepResult = small_evaluate(champion=champion, anchor=anchor, **inputs)
            return report

        @functools.wraps(small_merge)
        def merge_adapter(**inputs: Any) -> StepResult:
            return StepResult({**small_merge(**inputs).numbers, **({"best": best} if best else {})})

        small_steps |= {"evaluate": evaluate, "merge_adapter": merge_adapter}
        assert set(run_all(plan).values()) == {0}
        return plan

    return publish


def versions(store: Store) -> list[registry.Release]:
    names = sorted(store.children("models/intents/versions"))
    releases = [registry.read_release(store, "intents", name) for name in names]
    return sorted(releases, key=lambda release: release.provenance["run_id"])


def production(store: Store) -> str:
    alias, _ = registry.read_alias(store, "intents", "production")
    assert alias is not None
    return alias.version


def test_the_anchor_stays_until_a_version_is_certainly_better(
    publish_next: Callable[[str | None], Plan], store: Store, line: Path, root_uri: str
) -> None:
    publish_next("challenger")
    first = production(store)
    assert registry.read_release(store, "intents", first).anchor == first

    assert publish_next("champion").anchor is None, "the champion is the anchor: scored once"
    second = production(store)
    assert registry.read_release(store, "intents", second).anchor == first

    third_plan = publish_next("anchor")
    assert third_plan.anchor is not None
    assert third_plan.anchor.version == first
    third = production(store)
    assert registry.read_release(store, "intents", third).anchor == first

    publish_next("challenger")
    best = production(store)
    assert registry.read_release(store, "intents", best).anchor == best
    assert make_plan.make_plan(line, root_uri).anchor is None


def test_a_rollback_brings_back_the_anchor_of_that_time(
    publish_next: Callable[[str | None], Plan], store: Store, line: Path, root_uri: str
) -> None:
    publish_next("challenger")
    first = production(store)
    publish_next("champion")
    publish_next("challenger")
    # The release before the last one has the first version as its anchor.
    registry.rollback(store, "intents", "production", reason="worse in the field")
    plan = make_plan.make_plan(line, root_uri)
    assert plan.anchor is not None
    assert plan.anchor.version == first
    assert plan.step("evaluate").inputs["anchor"] == plan.anchor.manifest_sha256


def test_a_rejected_version_is_no_anchor(
    publish_next: Callable[[str | None], Plan], store: Store, line: Path, root_uri: str
) -> None:
    publish_next("challenger")
    first = registry.read_release(store, "intents", production(store))
    publish_next("champion")
    second = registry.read_release(store, "intents", production(store))
    assert make_plan.make_plan(line, root_uri).anchor is not None
    # A rollback rejects the version that production leaves, here the first one.
    registry.move_alias(store, "intents", "production", first, reason="back")
    registry.move_alias(store, "intents", "production", second, reason="forth, and reject it", action="rollback")
    assert make_plan.make_plan(line, root_uri).anchor is None


def test_a_broken_anchor_is_an_integrity_error(
    publish_next: Callable[[str | None], Plan], store: Store, line: Path, root_uri: str, tmp_path: Path,
    small_steps: dict[str, Any], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    publish_next("challenger")
    first = production(store)
    publish_next("champion")
    plan = make_plan.make_plan(line, root_uri, overrides=["train.seed=9"])
    for name in ("validate_data", "quantize_model", "train_qlora"):
        assert execute.run_step(plan, name, lambda name=name: small_steps[name]).code == 0

    # A file of the published anchor is replaced behind the store's back.
    (tmp_path / "store/models/intents/versions" / first / "model/config.json").write_text("[1]")
    assert execute.run_step(plan, "evaluate", lambda: small_steps["evaluate"]).code == 13
    assert "the line's best version is broken" in capsys.readouterr().err


def score_labels(right: int, rows: int = 400) -> list[RowScore]:
    return [RowScore(str(i), "eval", 1.0, 2, "a" if i < right else "b", i < right) for i in range(rows)]


def test_slipping_a_little_each_time_is_stopped_by_the_anchor() -> None:
    settings = EvaluateConfig(max_loss_to_champion=0.03, max_loss_to_anchor=0.05)
    # 1 point lost to the champion is allowed, 6 points lost to the anchor are not.
    scores = {
        "base": score_labels(100),
        "anchor": score_labels(380),
        "champion": score_labels(360),
        "challenger": score_labels(356),
    }
    verdict = apply_rules(scores, settings)
    assert verdict.decision == "refuse"
    assert [r.name for r in verdict.rules if not r.passed] == ["loss_to_anchor"]
    assert next(r for r in verdict.rules if r.name == "loss_to_anchor").value == pytest.approx(24 / 400)

    # Without an anchor the champion is the best version, so the anchor's limit applies to it.
    del scores["anchor"]
    assert apply_rules(scores, settings).decision == "pass"


def test_the_best_contestant_changes_only_for_one_that_is_certainly_better() -> None:
    settings = EvaluateConfig()
    assert (
        suite_rules.best_contestant({"base": score_labels(1), "challenger": score_labels(300)}, settings)
        == "challenger"
    )

    # 2 rows more of 400 may be chance, 30 rows more are not.
    rivals = {"base": score_labels(1), "champion": score_labels(300)}
    assert suite_rules.best_contestant({**rivals, "challenger": score_labels(302)}, settings) == "champion"
    assert suite_rules.best_contestant({**rivals, "challenger": score_labels(330)}, settings) == "challenger"
    assert (
        suite_rules.best_contestant({**rivals, "anchor": score_labels(330), "challenger": score_labels(331)}, settings)
        == "anchor"
    )


def test_too_few_rows_to_rule_out_the_margin_are_insufficient_evidence() -> None:
    # Equal answers on 60 rows: the challenger is not worse, but 60 rows cannot prove a margin of 0.02.
    scores = {"base": score_labels(10, 60), "champion": score_labels(50, 60), "challenger": score_labels(50, 60)}
    verdict = apply_rules(scores, EvaluateConfig(max_loss_to_champion=0.02))
    assert verdict.decision == "insufficient evidence"
    assert "60 rows can rule out no loss below 0.060" in verdict.sentence


def test_the_plan_pins_the_version_whose_data_drift_is_measured_from(
    publish_next: Callable[[str | None], Plan], store: Store, line: Path, root_uri: str, small_steps: dict[str, Any]
) -> None:
    before = publish_next("challenger")
    version = production(store)
    plan = make_plan.make_plan(line, root_uri, overrides=[f"data.reference_version={version}"])
    assert plan.reference is not None
    assert plan.step("validate_data").inputs["reference_profile"] == plan.reference.manifest_sha256
    assert plan.step("validate_data").key != before.step("validate_data").key
    fetched: list[str] = []

    def run(
        config: Any,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> StepResult:
        assert reference_profile is not None
        fetched.extend(p.relative_to(reference_profile).as_posix() for p in reference_profile.rglob("*") if p.is_file())
        return StepResult()

    assert execute.run_step(plan, "validate_data", lambda: run).code == 0
    assert fetched == [graph.PROFILE_PATH]

    with pytest.raises(UsageError, match="has no version 20200101T000000Z-000000000000"):
        make_plan.make_plan(line, root_uri, overrides=["data.reference_version=20200101T000000Z-000000000000"])
