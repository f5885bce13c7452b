"""Each row of each source is on its side: reserved conversations are apart from training, ids name one row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.validate_data.gate_rows import GateRows, read_gate_rows
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat, conversations
from qlora_retrain.lm.chat import ChatTokenizer

Read = Callable[..., GateRows]
SOURCES = ("raw_data", "golden_data", "eval_data")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> ChatTokenizer:
    return chat.load_tokenizer(tiny_model)


@pytest.fixture
def read(tmp_path: Path, tokenizer: ChatTokenizer) -> Read:
    """Reads the rows of each source that is given, each from a file `a.jsonl`."""
    runs = iter(range(100))

    def call(settings: dict[str, Any] | None = None, **sources: list[Any]) -> GateRows:
        folder = tmp_path / str(next(runs))
        for name, rows in sources.items():
            (folder / name).mkdir(parents=True)
            (folder / name / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(**{"split_seed": "line", **(settings or {})})
        paths = {name: folder / name if name in sources else None for name in SOURCES}
        return read_gate_rows(config, tokenizer, **paths)  # type: ignore[arg-type]

    return call


def talk(*texts: str, system: str | None = None, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns, **fields}


def rows_of(count: int) -> list[dict[str, Any]]:
    return [talk(f"question {i}", f"answer {i}") for i in range(count)]


def reasons(gate_rows: GateRows) -> Counter[str | None]:
    return Counter(row.reason for row in gate_rows.rows)


def test_no_part_of_a_golden_or_evaluation_conversation_is_trained_on(read: Read) -> None:
    raw = rows_of(60)
    raw += [talk(f"QUESTION {i}", "a", "more?", "b") for i in (0, 1)]
    golden, evaluation = [talk("Question  0", "x")], [talk("question 1", "x", "and?", "y"), talk("new", "z")]
    gate_rows = read(raw_data=raw, golden_data=golden, eval_data=evaluation)
    assert reasons(gate_rows) == {None: 60, "in_golden_set": 2, "in_eval_data": 2}
    sides = gate_rows.by_split()
    assert (len(sides["train"]), len(sides["eval"]), len(sides["golden"])) == (58, 2, 1)
    learnt = {conversations.canonical_text(row.messages[0]["content"]) for row in sides["train"]}
    assert not learnt & {"question 0", "question 1"}


@pytest.mark.parametrize("has_evaluation_file", [False, True])
def test_rows_that_are_no_independent_evidence_have_one_prompt(read: Read, has_evaluation_file: bool) -> None:
    """One question in other letters or under another instruction, and one conversation with its continuations."""
    groups = [[talk(f"question {i}", f"answer {n}") for n in range(7)] for i in range(12)]
    groups += [[talk("Where is it?", "a"), talk("where  IS it?", "b"), talk("Where is it?", "c", system="Be brief.")]]
    groups += [[talk("more", *["a", "b"] * n, "a") for n in range(4)]]
    # A greeting with which many chats begin says nothing about them.
    groups += [[talk("hello", "hi", f"topic {i}", "a")] for i in range(20)]
    rows = [row for group in groups for row in group]
    golden = [talk("gold", "x"), talk("GOLD", "y"), talk("hello", "hi", "golden topic", "z")]
    sources = {"raw_data": rows_of(30), "eval_data": rows} if has_evaluation_file else {"raw_data": rows}
    if has_evaluation_file:
        sources["raw_data"] += [talk("hello", "hi", f"other {i}", "a") for i in range(30)]
    gate_rows = read(golden_data=golden, **sources)

    prompts = {row.location.removeprefix("eval_data/"): row.prompt_id for row in gate_rows.rows[-len(rows) :]}
    ids = iter(prompts.values())
    by_group = [{next(ids) for _ in group} for group in groups]
    assert [len(group) for group in by_group] == [1] * len(groups)
    assert len(set().union(*by_group)) == len(groups)
    assert all(row.prompt_id for row in gate_rows.rows)
    assert [row.prompt_id for row in gate_rows.golden].count(gate_rows.golden[0].prompt_id) == 2
    assert gate_rows.golden[2].prompt_id not in set().union(*by_group)


def test_with_an_evaluation_file_no_row_is_kept_from_training_and_its_limit_holds(read: Read) -> None:
    evaluation = [talk(f"other {i}", "x") for i in range(30)]
    gate_rows = read({"max_eval_rows": 20}, raw_data=rows_of(50), eval_data=evaluation)
    assert Counter(row.split for row in gate_rows.rows) == {"train": 50, "eval": 20, "dropped": 10}
    assert gate_rows.eval_fraction is gate_rows.shared_openings is None


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ([talk("a", "x"), talk("b")], r"eval_data: a\.jsonl:2: .*no assistant turn.*\(1 of 2 rows to correct\)"),
        ([talk("long " * 2000, "x")], r"eval_data: a\.jsonl:1: .*too|longer.*data\.max_length_tokens: \d+ keeps all"),
    ],
)
def test_a_bad_evaluation_row_is_an_error(read: Read, evaluation: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(raw_data=rows_of(20), eval_data=evaluation)


def test_a_repeated_evaluation_row_is_left_out_and_a_repeated_golden_one_is_an_error(read: Read) -> None:
    twice = [talk("a", "x"), talk("a", "x")]
    gate_rows = read(raw_data=rows_of(20), eval_data=twice)
    assert [(r.file, r.reason) for r in gate_rows.rows[20:]] == [
        ("eval_data/a.jsonl", None),
        ("eval_data/a.jsonl", "exact_duplicate"),
    ]
    with pytest.raises(UsageError, match=r"golden_data: a\.jsonl:2: an earlier row has the same prompt"):
        read(raw_data=rows_of(20), golden_data=twice)


def test_contradicting_evaluation_labels_are_an_error(read: Read) -> None:
    with pytest.raises(UsageError, match=r"eval_data: a\.jsonl:1: another row has the same prompt with another label"):
        read({"task": "labels"}, raw_data=rows_of(20), eval_data=[talk("a", "x"), talk("a", "y")])


def test_too_few_golden_rows_are_refused_before_anything_is_trained(read: Read) -> None:
    with pytest.raises(UsageError, match=r"2 rows of 2 different prompts, and evaluate\.min_golden_prompts needs 10"):
        read({"min_golden_prompts": 10}, raw_data=rows_of(20), golden_data=[talk("a", "x"), talk("b", "y")])


def test_tasks_told_apart_by_their_system_turn_or_by_a_letter_are_good_data(read: Read) -> None:
    raw = [talk(f"word {i}", label, system=system) for i in range(20) for label, system in (
        ("noun", "Name the part of speech."), ("positive", "Name the sentiment."))]  # fmt: skip
    raw += [talk("us", "pronoun"), talk("US", "country"), talk("us", "verb")]
    gate_rows = read({"task": "labels"}, raw_data=raw)
    assert reasons(gate_rows) == {None: 41, "conflicting_answer": 2}
    # The same word under both instructions is on one side.
    sides = [row.split for row in gate_rows.rows]
    assert all(sides[i] == sides[i + 1] for i in range(0, 40, 2))


def test_what_the_template_renders_alike_is_one_prompt(tokenizer: ChatTokenizer, read: Read) -> None:
    template = tokenizer.tokenizer.chat_template
    tokenizer.tokenizer.chat_template = template.replace("['content']", "['content']|trim").replace(
        ".content", ".content|trim"
    )
    try:
        gate_rows = read({"task": "labels"}, raw_data=[talk("a", "x"), talk("a ", "y"), talk("b", "y")])
    finally:
        tokenizer.tokenizer.chat_template = template
    assert reasons(gate_rows) == {None: 1, "conflicting_answer": 2}


def test_ids_name_one_row_though_prompts_repeat(read: Read) -> None:
    raw = [talk("tell a joke", f"joke {i}") for i in range(30)] + rows_of(30)
    rows = [row for row in read(raw_data=raw).rows if row.split]
    assert len({conversations.row_id(row.messages, row.tools) for row in rows}) == len(rows) == 60
    assert len({row.split for row in rows[:30]}) == 1
