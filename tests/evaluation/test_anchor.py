"""The line's best version so far: how it is handed on, and what the plan and the rules make of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.outcome import Report
from qlora_retrain.evaluation import verdict
from qlora_retrain.evaluation.rows import RowScore
from qlora_retrain.evaluation.rules import overall
from qlora_retrain.pipeline import execute, plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import registry
from qlora_retrain.storage.store import Store

RunAll = Callable[[Plan], dict[str, int]]


@pytest.fixture
def publish_next(
    line: Path, root_uri: str, run_all: RunAll, small_steps: dict[str, Any]
) -> Callable[[str | None], Plan]:
    """Publish one more version; the certificate says that the best one is this contestant."""
    passing, merging = small_steps["evaluate"], small_steps["merge_adapter"]
    count = 0

    def publish(best: str | None) -> Plan:
        nonlocal count, small_steps
        count += 1
        made = plan.make(line, root_uri, overrides=[f"train.learning_rate={count / 1000}"])

        @functools.wraps(passing)
        def evaluate(champion: Path | None, anchor: Path | None, **others: Any) -> Report:
            seen = {"champion": champion, "anchor": anchor}
            assert {name for name, folder in seen.items() if folder} == {
                name for name in seen if made.pinned_version(name)
            }
            for folder in filter(None, seen.values()):
                assert (folder / "model" / "config.json").is_file()
            assert champion is None or (champion / graph.PROFILE).is_file()
            assert anchor is None or not (anchor / graph.PROFILE).exists()
            report: Report = passing(champion=champion, anchor=anchor, **others)
            return report

        @functools.wraps(merging)
        def merge_adapter(**given: Any) -> Report:
            return Report({**merging(**given).numbers, **({"best": best} if best else {})})

        small_steps |= {"evaluate": evaluate, "merge_adapter": merge_adapter}
        assert set(run_all(made).values()) == {0}
        return made

    return publish


def versions(store: Store) -> list[registry.Release]:
    names = sorted(store.children("models/intents/versions"))
    found = [registry.read_release(store, "intents", name) for name in names]
    return sorted(found, key=lambda release: release.provenance["run_id"])


def production(store: Store) -> str:
    found, _ = registry.alias(store, "intents", "production")
    assert found is not None
    return found.version


def test_the_anchor_stays_until_a_version_is_surely_better(
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
    assert plan.make(line, root_uri).anchor is None


def test_a_rollback_brings_back_the_anchor_of_that_time(
    publish_next: Callable[[str | None], Plan], store: Store, line: Path, root_uri: str
) -> None:
    publish_next("challenger")
    first = production(store)
    publish_next("champion")
    publish_next("challenger")
    registry.rollback(store, "intents", "production", reason="worse in the field")
    made = plan.make(line, root_uri)
    assert made.anchor is not None
    assert made.anchor.version == first
    assert made.step("evaluate").inputs["anchor"] == made.anchor.manifest_sha256


def test_a_rejected_version_holds_nobody_to_its_mark(
    publish_next: Callable[[str | None], Plan], store: Store, line: Path, root_uri: str
) -> None:
    publish_next("challenger")
    first = registry.read_release(store, "intents", production(store))
    publish_next("champion")
    second = registry.read_release(store, "intents", production(store))
    assert plan.make(line, root_uri).anchor is not None
    registry.move(store, "intents", "production", first, reason="back")
    registry.move(store, "intents", "production", second, reason="forth, and away with it", reject_current=True)
    assert plan.make(line, root_uri).anchor is None


def test_a_broken_anchor_is_an_integrity_error(
    publish_next: Callable[[str | None], Plan], store: Store, line: Path, root_uri: str, tmp_path: Path,
    small_steps: dict[str, Any], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    publish_next("challenger")
    first = production(store)
    publish_next("champion")
    made = plan.make(line, root_uri, overrides=["train.seed=9"])
    for name in ("validate_data", "quantize_model", "train_qlora"):
        assert execute.execute(made, name, lambda name=name: small_steps[name]) == 0
    (tmp_path / "store/models/intents/versions" / first / "model/config.json").write_text("[1]")
    assert execute.execute(made, "evaluate", lambda: small_steps["evaluate"]) == 13
    assert "the line's best version is broken" in capsys.readouterr().err


def scored(right: int, rows: int = 400) -> list[RowScore]:
    return [RowScore(str(i), "eval", 1.0, 2, "a" if i < right else "b", i < right) for i in range(rows)]


def test_slipping_a_little_each_time_is_stopped_by_the_anchor() -> None:
    settings = EvaluateConfig(max_loss_to_champion=0.03, max_loss_to_anchor=0.05)
    scores = {"base": scored(100), "anchor": scored(380), "champion": scored(360), "challenger": scored(356)}
    judged = verdict.judge(scores, settings)
    assert judged.verdict == "refuse"
    assert [r.name for r in judged.rules if not r.passed] == ["loss_to_anchor"]
    assert next(r for r in judged.rules if r.name == "loss_to_anchor").value == pytest.approx(24 / 400)
    del scores["anchor"]  # where the champion is the best there was, it is held to the anchor's limit too
    assert verdict.judge(scores, settings).verdict == "pass"


def test_the_best_is_whom_nobody_surely_beat() -> None:
    settings = EvaluateConfig()
    assert overall.best({"base": scored(1), "challenger": scored(300)}, settings) == "challenger"
    rivals = {"base": scored(1), "champion": scored(300)}
    assert overall.best({**rivals, "challenger": scored(302)}, settings) == "champion"
    assert overall.best({**rivals, "challenger": scored(330)}, settings) == "challenger"
    assert overall.best({**rivals, "anchor": scored(330), "challenger": scored(331)}, settings) == "anchor"


def test_too_few_rows_to_rule_out_the_margin_are_insufficient_evidence() -> None:
    scores = {"base": scored(10, 60), "champion": scored(50, 60), "challenger": scored(50, 60)}
    judged = verdict.judge(scores, EvaluateConfig(max_loss_to_champion=0.02))
    assert judged.verdict == "insufficient evidence"
    assert "60 rows can rule out no loss below 0.060" in judged.sentence


def test_the_plan_pins_the_version_whose_data_is_the_reference(
    publish_next: Callable[[str | None], Plan], store: Store, line: Path, root_uri: str, small_steps: dict[str, Any]
) -> None:
    before = publish_next("challenger")
    version = production(store)
    made = plan.make(line, root_uri, overrides=[f"data.reference={version}"])
    assert made.reference is not None
    assert made.step("validate_data").inputs["reference_profile"] == made.reference.manifest_sha256
    assert made.step("validate_data").key != before.step("validate_data").key
    seen: list[str] = []

    def run(
        config: Any,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        dataset: Path,
    ) -> Report:
        assert reference_profile is not None
        seen.extend(p.relative_to(reference_profile).as_posix() for p in reference_profile.rglob("*") if p.is_file())
        return Report()

    assert execute.execute(made, "validate_data", lambda: run) == 0
    assert seen == [graph.PROFILE]
    with pytest.raises(UsageError, match="has no version 20200101T000000Z-000000000000"):
        plan.make(line, root_uri, overrides=["data.reference=20200101T000000Z-000000000000"])
