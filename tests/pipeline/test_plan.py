"""The plan: resolved, pinned and addressed once; what may change a key, and what may not."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core import graph, hashing
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import code_identity, explain, make_plan, plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store, registry, signatures

AT = datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)
RunAll = Callable[[Plan], dict[str, int]]


def keys_of(plan: Plan) -> dict[str, str]:
    return {step.name: step.key for step in plan.steps}


def changed(before: Plan, after: Plan) -> set[str]:
    old, new = keys_of(before), keys_of(after)
    return {name for name in old if old[name] != new[name]}


@pytest.fixture
def with_settings(line: Path, root_uri: str) -> Callable[..., Plan]:
    """A new plan of the line with these overrides."""

    def make(*overrides: str, root: str = root_uri) -> Plan:
        return make_plan.make_plan(line, root, overrides=overrides)

    return make


def test_a_plan_is_kept_where_its_run_has_one(line: Path, root_uri: str) -> None:
    first = make_plan.make_plan(line, root_uri, run="r1", at=AT)
    (line.parent / "tickets.jsonl").write_text("other data\n")
    assert make_plan.make_plan(line, root_uri, run="r1", overrides=["train.learning_rate=0.5"]) == first
    line.write_text("broken: [")  # a cleared run goes on even so
    assert make_plan.make_plan(line, root_uri, run="r1") == first


def test_a_new_trigger_makes_a_new_plan(with_settings: Callable[..., Plan]) -> None:
    first, second = with_settings(), with_settings()
    assert first.run_id != second.run_id
    assert changed(first, second) == set()


def test_the_same_orchestrator_ids_find_the_same_plan_at_another_second(line: Path, root_uri: str) -> None:
    first = make_plan.make_plan(line, root_uri, orchestrator=["dag", "run"], at=AT)
    again = make_plan.make_plan(line, root_uri, orchestrator=["dag", "run"], at=AT.replace(year=2027))
    second = make_plan.make_plan(line, root_uri, orchestrator=["dag", "run 2"], at=AT)
    assert again == first
    assert second.run_id != first.run_id


def test_a_run_id_never_shows_the_orchestrators_own_string() -> None:
    name = plan.run_id(AT, "../../etc/passwd", "a b")
    assert name.startswith("20260131T235959Z-")
    assert len(name) == len("20260131T235959Z-") + 12
    assert name != plan.run_id(AT, "../../etc/passwd a", "b")


def test_keys_are_equal_in_every_root(with_settings: Callable[..., Plan], tmp_path: Path) -> None:
    here, there = with_settings(), with_settings(root=(tmp_path / "elsewhere").as_uri())
    assert here.root != there.root
    assert keys_of(here) == keys_of(there)


def test_keys_are_equal_wherever_the_same_sources_lie(
    with_settings: Callable[..., Plan], line: Path, root_uri: str, tmp_path: Path
) -> None:
    shutil.copytree(line.parent, tmp_path / "moved")
    assert keys_of(with_settings()) == keys_of(make_plan.make_plan(tmp_path / "moved" / line.name, root_uri))


@pytest.mark.parametrize(
    "override", ["train.max_hours=0.5", "train.log_every_steps=1", "train.checkpoint_minutes=9", "description=x"]
)
def test_an_operational_field_changes_no_key(with_settings: Callable[..., Plan], override: str) -> None:
    assert changed(with_settings(), with_settings(override)) == set()


@pytest.mark.parametrize(
    ("override", "steps"),
    [
        ("train.learning_rate=1e-4", {"train_qlora", "evaluate", "merge_adapter", "publish"}),
        ("data.eval_fraction=0.2", {"validate_data", "train_qlora", "evaluate", "merge_adapter", "publish"}),
        ("quantize.double_quant=false", {"quantize_model", "train_qlora", "evaluate", "merge_adapter", "publish"}),
        ("evaluate.confidence=0.9", {"evaluate", "merge_adapter", "publish"}),
        ("merge.base=original", {"merge_adapter", "publish"}),
        ("publish.licence=MIT", {"publish"}),
        ("line=other", {"validate_data", "train_qlora", "evaluate", "merge_adapter", "publish"}),  # it seeds the split
    ],
)
def test_a_setting_changes_its_step_and_what_follows(
    with_settings: Callable[..., Plan], override: str, steps: set[str]
) -> None:
    assert changed(with_settings(), with_settings(override)) == steps


def test_reference_text_is_an_input_of_the_data_set_where_there_are_replay_rows_alone(
    with_settings: Callable[..., Plan], line: Path
) -> None:
    shutil.copytree(line.parent / "base", line.parent / "general")
    reference, replay = "sources.reference_data=general", "sources.replay_data=tickets.jsonl"
    plain = with_settings()
    assert changed(plain, with_settings(reference)) == {"evaluate", "merge_adapter", "publish"}
    both = with_settings(reference, replay)
    assert both.step("validate_data").inputs["reference_data"] == both.step("evaluate").inputs["reference_data"]
    assert "validate_data" in changed(with_settings(replay), both)
    assert "validate_data" in changed(plain, with_settings(replay))


def test_new_weights_under_the_same_tokenizer_keep_the_dataset(with_settings: Callable[..., Plan], line: Path) -> None:
    before = with_settings()
    (line.parent / "base" / "model.safetensors").write_text("other weights")
    assert "validate_data" not in changed(before, with_settings())
    (line.parent / "base" / "tokenizer.json").write_text('{"other": 1}')
    assert "validate_data" in changed(before, with_settings())


def test_a_new_champion_changes_only_evaluate_and_what_follows(
    with_settings: Callable[..., Plan], run_all: RunAll
) -> None:
    before = with_settings()
    assert set(run_all(before).values()) == {0}
    after = with_settings()
    assert after.champion is not None
    assert changed(before, after) == {"evaluate", "merge_adapter", "publish"}


def test_the_same_recipe_as_production_is_unchanged(with_settings: Callable[..., Plan], run_all: RunAll) -> None:
    first = with_settings()
    run_all(first)
    again = with_settings()
    assert again.unchanged == again.champion.version if again.champion else False
    assert with_settings("train.learning_rate=0.5").unchanged is None
    assert with_settings("evaluate.confidence=0.9").unchanged is None
    assert with_settings("train.log_every_steps=3").unchanged == again.unchanged


def test_after_a_rollback_the_next_plan_does_not_count_the_old_release_as_done(
    with_settings: Callable[..., Plan], run_all: RunAll, root_uri: str, line: Path
) -> None:
    run_all(with_settings())
    (line.parent / "tickets.jsonl").write_text("newer data\n")
    second = with_settings()
    assert set(run_all(second).values()) == {0}
    registry.rollback(open_store(root_uri), "intents", "production", reason="it swears")
    third = with_settings()
    assert third.unchanged is None
    assert changed(second, third) == {"publish"}
    assert run_all(third)["publish"] == 11  # the content was rejected; nobody is told that it was published


def test_a_plan_leaves_nothing_automatic_and_says_why(with_settings: Callable[..., Plan]) -> None:
    resolved = with_settings()
    left = {f"{s.name}.{field}" for s in resolved.steps for field, value in s.config.items() if value == "auto"}
    # By each file's ending, and by the numbers of its rows and passages.
    by_data = {"validate_data.format", "validate_data.eval_fraction"}
    assert left == {*by_data, "evaluate.max_forgetting_nats", "merge_adapter.base"}
    choices = {c.field: c.value for c in resolved.choices}
    assert {"data.split_seed", "train.device", "train.attention", "evaluate.device", "merge.device"} <= choices.keys()
    for field, value in choices.items():
        section, _, name = field.partition(".")
        assert [str(s.config[name]) for s in resolved.steps if graph.step(s.name).section == section] == [value]
    assert all(c.reason for c in resolved.choices)


def test_kernels_for_a_gpu_are_refused_where_the_plan_has_none(with_settings: Callable[..., Plan]) -> None:
    with pytest.raises(UsageError, match=r"train\.kernels: liger needs train\.device: cuda, and it is cpu"):
        with_settings("train.kernels=liger", "train.device=cpu")
    assert with_settings("train.kernels=liger", "train.device=cuda").step("train_qlora").config["kernels"] == "liger"


def test_a_plan_that_was_moved_or_spoiled_is_refused(with_settings: Callable[..., Plan], tmp_path: Path) -> None:
    resolved = with_settings()
    store = tmp_path / "store" / "runs" / resolved.run_id / "plan.json"
    copy = tmp_path / "store" / "runs" / "other" / "plan.json"
    copy.parent.mkdir()
    copy.write_bytes(store.read_bytes())
    with pytest.raises(IntegrityError, match="is a copy of"):
        Plan.read(copy.as_uri())
    copy.write_text(json.dumps({"schema_version": 2}))
    with pytest.raises(IntegrityError, match="is not a plan"):
        Plan.read(copy.as_uri())
    with pytest.raises(UsageError, match="there is no plan here"):
        Plan.read((tmp_path / "store" / "runs" / "none" / "plan.json").as_uri())


def set_value(document: Any, path: str, value: Any) -> None:
    *parents, name = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        document = document[part]
    document[name] = value


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("steps/2/config/learning_rate", 0.9, r"train_qlora\.identity does not follow"),
        ("steps/2/identity/learning_rate", 0.9, r"train_qlora\.identity does not follow"),
        ("steps/2/key", "f" * 64, r"train_qlora\.key does not follow"),
        ("steps/2/code", "f" * 64, r"train_qlora\.key does not follow"),
        ("steps/3/config/min_accuracy", -1.0, r"evaluate\.config: "),
        ("steps/3/inputs/adapter", "f" * 64, r"evaluate\.inputs does not follow"),
        ("steps/5/inputs/model", "f" * 64, r"publish\.inputs does not follow"),
        ("steps/5/inputs/another", "f" * 64, r"publish\.inputs does not follow"),
        ("steps/5/inputs/target", "20260101T000000Z-x of generation 1", "moves an alias from 20260101T000000Z-x"),
        ("target", "20260101T000000Z-x", "its target is 20260101T000000Z-x"),
        ("steps/5/config/promote_to", "staging", r"publish\.identity does not follow"),
        ("sources/raw_data/files/0/pin", "f" * 64, r"validate_data\.inputs does not follow"),
        ("champion", {"version": "v", "manifest_sha256": "f" * 64, "content_hash": "f"}, "inputs does not follow"),
        ("steps", [], "its steps are , expected"),
    ],
)
def test_a_plan_that_says_other_than_its_keys_is_refused(
    with_settings: Callable[..., Plan], line: Path, root_uri: str, path: str, value: Any, fault: str
) -> None:
    resolved = with_settings()
    file = Path(resolved.uri.removeprefix("file://").partition("#")[0])
    document = json.loads(file.read_text())
    set_value(document, path, value)
    file.write_text(json.dumps(document))

    # Whoever has no key of the planner's cannot even make a plan that contradicts itself.
    with pytest.raises(IntegrityError, match=r"expected a signature by planner .*, found no valid signature"):
        make_plan.make_plan(line, root_uri, run=resolved.run_id)
    # A planner with a fault, or one that another version of this code was.
    del document["signature"]
    signed = signatures.sign_fields(open_store(root_uri), f"runs/{resolved.run_id}/plan.json", document, "planner")
    assert signed is not None
    file.write_text(json.dumps(document | {"signature": signed.model_dump()}))

    # With the hash from the plan's maker, no change at all goes unnoticed.
    with pytest.raises(IntegrityError, match="changed since it was made"):
        Plan.load(resolved.uri)
    # A run that is begun again takes the plan that it has, if that plan can be one.
    with pytest.raises(IntegrityError, match=fault):
        make_plan.make_plan(line, root_uri, run=resolved.run_id)
    # Whoever changes a plan can compute its hash, too.
    with pytest.raises(IntegrityError, match=fault):
        Plan.load(f"{file.as_uri()}#sha256={hashing.sha256_file(file)}")


def test_a_step_takes_no_plan_without_its_hash(with_settings: Callable[..., Plan]) -> None:
    place, _, _ = with_settings().uri.partition("#")
    with pytest.raises(UsageError, match=r"expected the plan's URI with its hash"):
        Plan.load(place)
    with pytest.raises(IntegrityError, match="changed since it was made"):
        Plan.load(f"{place}#sha256={'0' * 64}")


def test_a_plan_holds_every_step_with_the_code_that_will_run(with_settings: Callable[..., Plan]) -> None:
    resolved = with_settings()
    assert [s.name for s in resolved.steps] == [s.name for s in graph.STEPS]
    assert {s.name: s.code for s in resolved.steps} == {s.name: code_identity.code_hash(s.name) for s in graph.STEPS}
    assert Plan.load(resolved.uri) == resolved


def refused(config: Path, root: str, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(UsageError) as caught:
        make_plan.make_plan(config, root, overrides=overrides)
    return str(caught.value)


def test_a_plan_for_a_source_that_is_not_there_is_refused(line: Path, root_uri: str) -> None:
    assert "sources.raw_data" in refused(line, root_uri, ["sources.raw_data=gone.jsonl"])


def test_a_plan_says_how_many_files_are_taken_and_which_are_left_out(line: Path, root_uri: str) -> None:
    data = line.parent / "data"
    (data / "old").mkdir(parents=True)
    for name in ("README.md", "a.csv", ".old.jsonl", "old/tickets.jsonl", "b\x1b[2J.csv"):
        (data / name).write_text("x")
    shutil.copy(line.parent / "tickets.jsonl", data)
    overrides = [f"sources.raw_data={{uri: {data}, files: ['*.jsonl', '*.md']}}", f"sources.golden_data={data}/a.csv"]
    text = explain.as_text(make_plan.make_plan(line, root_uri, overrides=overrides))
    assert (
        "\nraw_data: 1 file taken, 5 left out: 3 that no pattern takes (a.csv, b\\x1b[2J.csv, old/tickets.jsonl); "
        "1 hidden, as their names begin with a dot (.old.jsonl); 1 that hold no rows by their names (README.md)\n"
    ) in text
    assert "\ngolden_data: 1 file taken, 0 left out\n" in text
    assert "\nbase_model: 3 files taken, 0 left out\n" in text


def test_a_root_with_a_secret_is_refused_and_not_repeated(line: Path) -> None:
    message = refused(line, "s3://AKIAUSER:hunter2/x@bucket/prefix")
    assert "hunter2" not in message
    assert "AKIAUSER" not in message


def test_later_data_is_split_as_that_of_the_version_in_production(
    with_settings: Callable[..., Plan],
    run_all: RunAll,
    small_steps: dict[str, Callable[..., StepResult]],
    line: Path,
) -> None:
    gate = small_steps["validate_data"]

    @functools.wraps(gate)
    def validate_data(**inputs: Any) -> StepResult:
        gate(**inputs)
        return StepResult({"rows_train": 27, "eval_fraction": 0.4, "shared_openings": "0123456789abcdef"})

    small_steps["validate_data"] = validate_data
    first = with_settings()
    run_all(first)
    # With the same data there is nothing to do.
    assert with_settings().unchanged is not None
    assert changed(first, with_settings("data.min_eval_prompts=31")) >= {"validate_data"}

    (line.parent / "tickets.jsonl").write_text("more data\n")
    grown = with_settings()
    data = grown.step("validate_data").config
    assert (data["min_eval_fraction"], data["shared_openings"]) == (0.4, ["0123456789abcdef"])
    reasons = grown.choice_reasons("data")
    assert "the version in production" in reasons["min_eval_fraction"]
    # The version that follows hands the same on, so its data is not made again either.
    assert set(run_all(grown).values()) == {0}
    assert with_settings().unchanged is not None


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ((), 30),
        (("evaluate.min_prompts=50",), 50),
        (("evaluate.min_prompts=10", "merge.min_prompts=20"), 20),
        (("merge.base=measured",), 60),
        (("merge.base=original", "evaluate.min_prompts=12"), 12),
        (("data.min_eval_prompts=70", "merge.base=measured"), 70),
        (("merge.base=original", "merge.rank=smallest"), 60),
    ],
)
def test_the_data_gate_asks_for_the_rows_that_the_later_gates_need(
    with_settings: Callable[..., Plan], overrides: tuple[str, ...], needed: int
) -> None:
    assert with_settings(*overrides).step("validate_data").config["min_eval_prompts"] == needed


def test_a_data_gate_that_lets_too_little_through_is_refused_before_training(
    with_settings: Callable[..., Plan],
) -> None:
    with pytest.raises(
        UsageError, match=r"min_eval_prompts: 10 .* evaluate\.min_prompts needs .* 30 different prompts"
    ):
        with_settings("data.min_eval_prompts=10")
    with pytest.raises(UsageError, match=r"min_eval_prompts: 50 .* merge\.min_prompts needs .* 60 different prompts"):
        with_settings("data.min_eval_prompts=50", "merge.base=measured")


def test_golden_rows_are_asked_for_as_the_evaluation_needs_them(with_settings: Callable[..., Plan], line: Path) -> None:
    (line.parent / "golden.jsonl").write_text("golden\n")
    plans = [
        with_settings("sources.golden_data=golden.jsonl", f"evaluate.min_golden_prompts={count}") for count in (10, 3)
    ]
    assert [p.step("validate_data").config["min_golden_prompts"] for p in plans] == [10, 3]
    # Fewer rows refuse before anything is made, so the number is no part of what is made.
    assert plans[0].step("validate_data").key == plans[1].step("validate_data").key
