"""A line remembers what it has evaluated: across plans, changed data, other splits and other names of the line."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from components.validate_data.step import run as validate_data
from qlora_retrain.config.line import load
from qlora_retrain.core import graph
from qlora_retrain.core.errors import DataRefused, IntegrityError, UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import access, execute, explain, make_plan, status
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import artifact, key_admin, keys, open_store, signed_documents
from qlora_retrain.storage.store import Store
from tests.conftest import ticket_rows, write_jsonl

AT = datetime(2026, 1, 31, 3, 0, 0, tzinfo=UTC)
DATASET = "validate_data"


class Line:
    """A line with the real data gate; no other step is run.

    Attributes:
        evaluated: The canonical prompts of all its evaluation and golden rows until now.
    """

    def __init__(self, folder: Path, model: Path, root: str) -> None:
        self.folder, self.root = folder, root
        self.evaluated: set[str] = set()
        self.yaml = folder / "tickets.yaml"
        self.yaml.write_text(f"line: tickets\nsources: {{raw_data: raw.jsonl, base_model: {model}}}\n")

    def write(self, name: str, rows: list[Any]) -> None:
        write_jsonl(self.folder / name, rows)

    def plan(self, *overrides: str) -> Plan:
        return make_plan.make_plan(self.yaml, self.root, overrides=overrides)

    def run(self, *overrides: str) -> tuple[Plan, int]:
        """Make the data set of a new plan, and check it; return the plan and how many rows were evaluated before."""
        plan = self.plan(*overrides)
        assert execute.run_step(plan, DATASET, lambda: validate_data).code == 0
        rows = {side: self.prompts(plan, f"{side}.jsonl") for side in ("train", "eval", "golden")}
        assert not self.evaluated & rows["train"]
        self.evaluated |= rows["eval"] | rows["golden"]

        counts = self.profile(plan)["rows"]
        num_evaluated = counts["evaluated_before"]
        sides = {name: count for name, count in counts.items() if name not in ("read", "golden")}
        assert counts["read"] == sum(sides.values())
        assert counts["quarantined"] == 0
        assert ("evaluated_before</" in self._read(plan, "report.html")) == (num_evaluated > 0)
        return plan, num_evaluated

    def prompts(self, plan: Plan, name: str) -> set[str]:
        """The prompts of a file, without case and white space."""
        records = [json.loads(line) for line in self._read(plan, name).splitlines()]
        turns = ["".join(turn["content"] for turn in record["messages"][:-1]) for record in records]
        return {" ".join(text.casefold().split()) for text in turns}

    def profile(self, plan: Plan) -> dict[str, Any]:
        profile: dict[str, Any] = json.loads(self._read(plan, "profile.json"))
        return profile

    def _read(self, plan: Plan, name: str) -> str:
        manifest = status.find_manifest(plan, DATASET)
        assert manifest is not None
        return open_store(self.root).read(f"{manifest.prefix}/{name}").data.decode()


@pytest.fixture
def tickets(tmp_path: Path, tiny_model: Path, root_uri: str) -> Line:
    line = Line(tmp_path, tiny_model, root_uri)
    line.write("raw.jsonl", ticket_rows(300))
    return line


def key(plan: Plan) -> str:
    return plan.step(DATASET).key


def test_no_prompt_that_was_ever_evaluated_is_trained_on_whatever_changes(
    tickets: Line, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = ticket_rows(480)
    golden, evaluation = rows[300:330], rows[330:400]
    tickets.write("golden.jsonl", golden)
    tickets.write("evaluation.jsonl", evaluation)
    wide = "data.eval_fraction=0.4"

    first, count = tickets.run(wide)
    assert (first.history, count) == (None, 0)
    # Each change alone would train on prompts that were evaluated: more than none are kept out.
    _, lower = tickets.run("data.eval_fraction=0.15")
    assert lower > 40
    assert f"{lower} rows were kept out of training" in capfd.readouterr().out
    tickets.write("raw.jsonl", [*reversed(rows[400:]), *ticket_rows(300)])
    _, grown = tickets.run("data.eval_fraction=0.15")
    assert grown == lower
    _, new_seed = tickets.run("data.eval_fraction=0.15", "data.split_seed=another")
    assert new_seed > 40
    _, fewer = tickets.run("data.eval_fraction=0.15", "data.max_eval_rows=30")
    assert fewer >= lower

    # Files of one's own, and their rows in the data once they are taken away.
    tickets.run("sources.golden_data=golden.jsonl", "sources.eval_data=evaluation.jsonl")
    tickets.write("raw.jsonl", rows)
    _, without_files = tickets.run("data.eval_fraction=0.15")
    assert without_files > lower + 70
    tickets.write("golden.jsonl", golden[:20])
    plan, _ = tickets.run("sources.golden_data=golden.jsonl", "sources.eval_data=evaluation.jsonl")
    assert tickets.profile(plan)["rows"]["in_golden_set"] == 20

    # A renamed line.
    tickets.yaml.write_text(tickets.yaml.read_text().replace("line: tickets", "line: requests"))
    _, renamed = tickets.run("data.eval_fraction=0.15", "data.history_of=tickets")
    assert renamed > 100
    # Its own history has all of it from then on.
    _, later = tickets.run("data.eval_fraction=0.2")
    assert later > 80


def test_without_the_old_name_a_renamed_line_begins_anew(tickets: Line) -> None:
    tickets.run("data.eval_fraction=0.4")
    tickets.yaml.write_text(tickets.yaml.read_text().replace("line: tickets", "line: requests"))
    with pytest.raises(AssertionError):  # of `Line.run`: this is what the history prevents
        tickets.run("data.eval_fraction=0.15")


def test_an_unchanged_line_makes_nothing_again(line: Path, root_uri: str, run_all: RunAll, store: Store) -> None:
    first = make_plan.make_plan(line, root_uri)
    run_all(first)
    for _ in range(2):
        plan = make_plan.make_plan(line, root_uri)
        assert plan.unchanged is not None
        # What follows reads the champion, which is another one now.
        assert [step.key for step in plan.steps[:3]] == [step.key for step in first.steps[:3]]
    assert len(list(store.children("histories/intents/datasets"))) == 1
    # Other settings of a later step leave the data set as it is.
    assert key(make_plan.make_plan(line, root_uri, overrides=["train.rank=8"])) == key(first)

    (line.parent / "tickets.jsonl").write_text("grown\n")
    grown = make_plan.make_plan(line, root_uri)
    assert grown.history is not None
    assert grown.step(DATASET).inputs[graph.HISTORY] == grown.history.sha256
    run_all(grown)
    again = make_plan.make_plan(line, root_uri)
    assert again.unchanged is not None
    assert again.history == grown.history


def test_without_a_champion_too_a_second_run_finds_every_artifact(line: Path, root_uri: str, run_all: RunAll) -> None:
    plans = [make_plan.make_plan(line, root_uri, overrides=["publish.promote_to=null"]) for _ in range(2)]
    run_all(plans[0])
    plans.append(make_plan.make_plan(line, root_uri, overrides=["publish.promote_to=null"]))
    for plan in plans:
        assert plan.champion is None
        assert all(status.exit_code(plan, step.name) == 0 for step in plan.steps)


RunAll = Callable[[Plan], dict[str, int]]
Planned = Callable[..., Plan]


@pytest.fixture
def store(root_uri: str) -> Store:
    return open_store(root_uri)


@pytest.fixture
def planned(line: Path, root_uri: str) -> Planned:
    """A plan of the line with this text as its data, each a minute after the one before."""
    minutes = itertools.count()

    def call(text: str, *overrides: str, name: str = "intents") -> Plan:
        (line.parent / "tickets.jsonl").write_text(text)
        line.write_text(f"line: {name}\nsources:\n  raw_data: tickets.jsonl\n  base_model: base\n")
        at = AT + timedelta(minutes=next(minutes))
        return make_plan.make_plan(line, root_uri, overrides=overrides, at=at)

    return call


@pytest.fixture
def make_dataset(small_steps: dict[str, Callable[..., StepResult]]) -> Callable[[Plan], None]:
    """Make the data set of a plan, which evaluates one prompt: its text."""

    def call(plan: Plan) -> None:
        assert execute.run_step(plan, DATASET, lambda: small_steps[DATASET]).code == 0

    return call


def line_of(text: str) -> str:
    return f"chat {hashlib.sha256(text.encode()).hexdigest()[:16]}\n"


def pinned_lines(store: Store, plan: Plan) -> list[str]:
    """The lines of a plan's history, read without the code under test."""
    assert plan.history is not None
    data = store.read(f"histories/{plan.line}/{plan.history.sha256}.txt").data
    return data.decode().splitlines(keepends=True)


def test_a_history_joins_all_data_sets_and_only_grows(
    planned: Planned, make_dataset: Callable[[Plan], None], store: Store
) -> None:
    texts = ["one", "two", "three", "four"]
    for i, text in enumerate(texts):
        plan = planned(text)
        assert ([] if i == 0 else pinned_lines(store, plan)) == sorted(line_of(t) for t in texts[:i])
        assert i == 0 or "will run: new raw_data, new evaluation_history" in explain.as_text(plan)
        make_dataset(plan)
    assert planned("five").history == planned("six").history
    assert ": 3 chats that were evaluated before are not trained on" in explain.as_text(plan)


def test_data_that_comes_back_is_not_the_data_set_that_knew_less(
    planned: Planned, make_dataset: Callable[[Plan], None], store: Store
) -> None:
    first = planned("one")
    make_dataset(first)
    second = planned("two")
    make_dataset(second)
    # The first data set may train on what the second one has evaluated.
    back = planned("one")
    assert key(back) not in (key(first), key(second))
    assert pinned_lines(store, back) == sorted([line_of("one"), line_of("two")])
    make_dataset(back)
    # From now on both come and go, and nothing is made again.
    again = planned("two")
    make_dataset(again)
    for _ in range(2):
        assert (key(planned("one")), key(planned("two"))) == (key(back), key(again))


def test_plans_that_were_made_at_once_forget_nothing(
    planned: Planned, make_dataset: Callable[[Plan], None], store: Store, line: Path
) -> None:
    make_dataset(planned("one"))
    both = {text: planned(text) for text in ("two", "three")}
    for text, plan in both.items():
        (line.parent / "tickets.jsonl").write_text(text)
        make_dataset(plan)
    assert pinned_lines(store, planned("four")) == sorted(map(line_of, ("one", "two", "three")))
    # Each may train on what the other one has evaluated, so neither is used again.
    for text, plan in both.items():
        assert key(planned(text)) != key(plan)


def test_a_data_set_that_was_never_made_or_was_refused_has_evaluated_nothing(
    planned: Planned, make_dataset: Callable[[Plan], None], small_steps: dict[str, Callable[..., StepResult]]
) -> None:
    planned("never made")
    gate = small_steps[DATASET]
    refuse = functools.wraps(gate)(lambda **inputs: StepResult(gate(**inputs).numbers, DataRefused("too few")))
    assert execute.run_step(planned("two"), DATASET, lambda: refuse).code == 10
    assert planned("three").history is None


def test_a_data_set_of_an_earlier_release_is_passed_over(
    planned: Planned, small_steps: dict[str, Callable[..., StepResult]]
) -> None:
    gate = small_steps[DATASET]

    @functools.wraps(gate)
    def earlier_gate(**inputs: Any) -> StepResult:
        result = gate(**inputs)
        (inputs["dataset"] / graph.EVALUATED_PROMPTS).unlink()
        return result

    plan = planned("one")
    assert execute.run_step(plan, DATASET, lambda: earlier_gate).code == 0
    assert planned("two").history is None
    assert "evaluation history" not in explain.as_text(plan)


def test_what_the_collector_may_remove_holds_no_memory(
    planned: Planned, make_dataset: Callable[[Plan], None], store: Store, line: Path
) -> None:
    make_dataset(planned("one"))
    planned("two")  # which joins the first
    removable = access.access(load(line), access.GC).deletes
    doomed = [e.path for e in store.list("") if any(fnmatchcase(e.path, pattern) for pattern in removable)]
    assert any(path.startswith("artifacts/dataset") for path in doomed)
    store.delete(doomed)
    assert pinned_lines(store, planned("three")) == [line_of("one")]


def test_a_plan_reads_no_more_records_as_a_line_grows_old(
    planned: Planned, make_dataset: Callable[[Plan], None], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    for text in ("a", "b", "c", "d"):
        plans.append(planned(text))
        make_dataset(plans[-1])
    # What a later record has joined is not read again: nobody would notice that it is gone, with its data set.
    reads = []
    read = type(store).read
    monkeypatch.setattr(type(store), "read", lambda self, path: reads.append(path) or read(self, path))
    assert len(pinned_lines(store, planned("e"))) == 4
    paths = [path for path in reads if path.startswith("histories/") or path.startswith("artifacts/dataset/")]
    assert not [path for path in paths if any(key(plan) in path for plan in plans[:-1])]


def test_a_name_without_a_history_is_refused_with_the_nearest_one(
    planned: Planned, make_dataset: Callable[[Plan], None], store: Store
) -> None:
    make_dataset(planned("one"))
    with pytest.raises(
        UsageError, match=r"history_of: line intent has no evaluation history .* did you mean intents\?"
    ):
        planned("one", "data.history_of=intent", name="renamed")
    with pytest.raises(UsageError, match="lines that have one: intents"):
        planned("one", "data.history_of=zzz", name="renamed")
    with pytest.raises(UsageError, match=r"data\.history_of"):
        planned("one", "data.history_of=../intents", name="renamed")
    renamed = planned("one", "data.history_of=intents", name="renamed")
    assert pinned_lines(store, renamed) == [line_of("one")]
    make_dataset(renamed)
    assert key(planned("one", "data.history_of=intents", name="renamed")) == key(renamed)
    # It is remembered under the new name, so the setting may go.
    assert pinned_lines(store, planned("two", name="renamed")) == [line_of("one")]


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_history_that_is_not_what_was_pinned_ends_with_13(
    planned: Planned,
    make_dataset: Callable[[Plan], None],
    store: Store,
    small_steps: dict[str, Callable[..., StepResult]],
    damage: str,
) -> None:
    make_dataset(planned("one"))
    plan = planned("two")
    assert plan.history is not None
    path = f"histories/intents/{plan.history.sha256}.txt"
    store.delete([path])
    if damage == "changed":
        store.write_if_absent(path, b"")
    ending = execute.run_step(plan, DATASET, lambda: small_steps[DATASET])
    assert ending.code == 13
    assert "could be trained on; bring the file back" in ending.reason
    with pytest.raises(IntegrityError, match="bring the file back"):
        planned("three")


def test_something_else_in_the_place_of_a_new_history_ends_with_13(
    planned: Planned, make_dataset: Callable[[Plan], None], store: Store
) -> None:
    make_dataset(planned("one"))
    name = hashlib.sha256(line_of("one").encode()).hexdigest()
    store.write_if_absent(f"histories/intents/{name}.txt", b"")
    with pytest.raises(IntegrityError, match="expected sha256"):
        planned("two")


def test_evaluated_prompts_that_are_not_the_data_sets_end_with_13(
    planned: Planned, make_dataset: Callable[[Plan], None], store: Store
) -> None:
    plan = planned("one")
    make_dataset(plan)
    manifest = status.find_manifest(plan, DATASET)
    assert manifest is not None
    path = f"{manifest.prefix}/{graph.EVALUATED_PROMPTS}"
    store.delete([path])
    with pytest.raises(IntegrityError, match=r"evaluated_prompts.txt: missing: to make it again, run: .* drop dataset"):
        planned("two")
    store.write_if_absent(path, b"chat 0123456789abcdef\n")
    with pytest.raises(IntegrityError, match="its sha256 differs"):
        planned("two")
    artifact.drop(store, "dataset", key(plan))
    assert planned("two").history is None


def test_a_line_that_is_no_digest_gets_into_no_history(
    planned: Planned, small_steps: dict[str, Callable[..., StepResult]]
) -> None:
    gate = small_steps[DATASET]

    @functools.wraps(gate)
    def leak(**inputs: Any) -> StepResult:
        result = gate(**inputs)
        (inputs["dataset"] / graph.EVALUATED_PROMPTS).write_text("How do I pay?\n")
        return result

    assert execute.run_step(planned("one"), DATASET, lambda: leak).code == 0
    with pytest.raises(IntegrityError, match="a line is no digest"):
        planned("two")


def test_a_record_is_signed_for_its_place_by_the_planner(
    planned: Planned, make_dataset: Callable[[Plan], None], store: Store
) -> None:
    make_dataset(planned("one"))
    (name,) = store.children("histories/intents/datasets")
    path = f"histories/intents/datasets/{name}"
    document = store.read(path)
    assert signed_documents.is_one(path)
    role, signer, _ = signed_documents.signer(path, document.data)
    keyring = keys.find_keyring(store.uri)
    assert keyring is not None
    assert (role, signer) == ("planner", keyring.trust.roles["planner"].key)

    store.swap(path, document.data.replace(b'"joined": []', b'"joined": ["x"]'), document.tag)
    with pytest.raises(IntegrityError, match="expected a signature by planner"):
        planned("three")
    store.delete([path])
    moved = path.replace(name[-69:-5], "0" * 64)
    store.write_if_absent(moved, document.data)
    with pytest.raises(IntegrityError, match="expected a signature by planner"):
        planned("three")


def test_after_a_stolen_planners_key_a_person_says_which_records_are_right(
    planned: Planned, make_dataset: Callable[[Plan], None], store: Store
) -> None:
    make_dataset(planned("one"))
    key_admin.rotate(store, "planner", is_stolen=True)
    with pytest.raises(IntegrityError, match="signed with a key that was replaced"):
        planned("two")
    (name,) = store.children("histories/intents/datasets")
    key_admin.accept(store, [f"histories/intents/datasets/{name}"])
    assert pinned_lines(store, planned("two")) == [line_of("one")]


def test_keys_that_are_made_later_accept_the_records_that_are_there(
    planned: Planned, make_dataset: Callable[[Plan], None], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_admin, "create_for_new_store", lambda *_: None)
    make_dataset(planned("one"))
    (name,) = store.children("histories/intents/datasets")
    assert "signature" not in json.loads(store.read(f"histories/intents/datasets/{name}").data)
    key_admin.create(store, ["intents"])
    assert pinned_lines(store, planned("two")) == [line_of("one")]


def test_data_that_is_left_too_small_is_refused_with_what_to_do(tickets: Line) -> None:
    tickets.run("data.eval_fraction=0.4")
    plan = tickets.plan("data.eval_fraction=0.15", "data.min_train_rows=250")
    ending = execute.run_step(plan, DATASET, lambda: validate_data)
    assert ending.code == 10
    assert "min_train_rows" in ending.reason
    assert "earlier runs of this line have evaluated their prompts (evaluated_before); those runs" in ending.reason
    assert "or begin anew with a line of another name" in ending.reason
    # Nobody has evaluated the data that was refused.
    assert tickets.plan("data.eval_fraction=0.15").history == plan.history


def test_a_memory_that_was_lost_is_noticed(line: Path, root_uri: str, run_all: RunAll, store: Store) -> None:
    first = make_plan.make_plan(line, root_uri)
    run_all(first)
    store.delete([entry.path for entry in store.list("histories")])
    with pytest.raises(IntegrityError, match="what the line has evaluated is forgotten") as caught:
        make_plan.make_plan(line, root_uri)
    # Whoever has no copy of it goes on without.
    assert f"qlora-retrain drop dataset {key(first)} --root {root_uri}" in str(caught.value)
    artifact.drop(store, "dataset", key(first))
    assert make_plan.make_plan(line, root_uri).history is None
