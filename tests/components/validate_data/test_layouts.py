"""One realistic row of each layout: what is recognised, and with which setting what is not.

The expected chat is written out by hand beside each row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.validate_data.raw_rows import RawRow, RowReader
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

Read = Callable[..., list[RawRow]]
Refuse = Callable[..., str]
ASK, REPLY = {"role": "user", "content": "Open on Monday?"}, {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "You work at a museum."}
FUNCTION = {"name": "hours", "description": "Opening hours", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "hours", "arguments": {"day": "Monday"}}}
# ShareGPT's form of the same turns.
HUMAN, GPT = {"from": "human", "value": "Open on Monday?"}, {"from": "gpt", "value": "No."}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def call(*rows: Any, **settings: Any) -> list[RawRow]:
        # Two lines at least: a single object could be a document that holds the rows.
        text = "".join(json.dumps(row) + "\n" for row in (rows if len(rows) > 1 else rows * 2))
        (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
        reader = RowReader(tmp_path, DataConfig(**settings), "raw_data")
        raw_rows = list(reader.rows())[: len(rows)]
        assert list(reader.layouts) == ["a.jsonl"]
        return raw_rows

    return call


@pytest.fixture
def refuse(read: Read) -> Refuse:
    def call(*rows: Any, **settings: Any) -> str:
        with pytest.raises(UsageError) as caught:
            read(*rows, **settings)
        return str(caught.value)

    return call


CHATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "openai": ({"messages": [SYSTEM, ASK, REPLY]}, [SYSTEM, ASK, REPLY]),
    "openai_with_options": ({"messages": [ASK, REPLY], "parallel_tool_calls": False, "temperature": 0.2}, [ASK, REPLY]),
    "messages_as_json_text": ({"messages": json.dumps([ASK, REPLY])}, [ASK, REPLY]),
    "sharegpt": ({"id": "m_1", "conversations": [HUMAN, GPT]}, [ASK, REPLY]),
    "sharegpt_with_system": ({"conversations": [HUMAN, GPT], "system": SYSTEM["content"]}, [SYSTEM, ASK, REPLY]),
    "sharegpt_without_system": ({"conversations": [HUMAN, GPT], "system": "", "tools": ""}, [ASK, REPLY]),
    "conversation": ({"conversation": [ASK, REPLY], "topic": "museums"}, [ASK, REPLY]),
    "dialogue": (
        {"dialogue": [{"speaker": "customer", "text": ASK["content"]}, {"speaker": "agent", "text": "No."}]},
        [ASK, REPLY],
    ),
    "turns": (
        {"turns": [{"role": "prompter", "text": ASK["content"]}, {"role": "assistant", "text": "No."}]},
        [ASK, REPLY],
    ),
    "chat_under_any_name": ({"exchange_log": [ASK, REPLY], "score": 0.9}, [ASK, REPLY]),
    "chat_within_an_object": ({"custom_id": "r-1", "body": {"model": "small", "messages": [ASK, REPLY]}}, [ASK, REPLY]),
    "exchanges": (
        {"conversation_id": 3, "conversation": [{"human": ASK["content"], "assistant": "No."}]},
        [ASK, REPLY],
    ),
    "inputs_and_outputs": (
        {"conversation": [{"system": SYSTEM["content"], "input": ASK["content"], "output": "No."}]},
        [SYSTEM, ASK, REPLY],
    ),
    "pairs": ({"dialog": [[ASK["content"], "No."]]}, [ASK, REPLY]),
    "texts_in_turn": ({"id": "7", "data": [ASK["content"], "No."]}, [ASK, REPLY]),
    "object_of_lists": ({"conversations": {"from": ["human", "gpt"], "value": [ASK["content"], "No."]}}, [ASK, REPLY]),
    "gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": SYSTEM["content"]}]},
            "contents": [
                {"role": "user", "parts": [{"text": ASK["content"]}]},
                {"role": "model", "parts": [{"text": "No."}]},
            ],
        },
        [SYSTEM, ASK, REPLY],
    ),
    "bedrock": (
        {
            "schemaVersion": "v1",
            "system": [{"text": SYSTEM["content"]}],
            "messages": [
                {"role": "user", "content": [{"text": ASK["content"]}]},
                {"role": "assistant", "content": [{"text": "No."}]},
            ],
        },
        [SYSTEM, ASK, REPLY],
    ),
    "cohere": (
        {
            "messages": [
                {"role": "System", "content": SYSTEM["content"]},
                {"role": "User", "content": ASK["content"]},
                {"role": "Chatbot", "content": "No."},
            ]
        },
        [SYSTEM, ASK, REPLY],
    ),
}
PAIRS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "prompt_completion": ({"prompt": ASK["content"], "completion": "No."}, [ASK, REPLY]),
    "prompt_response": ({"prompt": ASK["content"], "response": "No."}, [ASK, REPLY]),
    "question_answer": ({"Question": ASK["content"], "Answer": "No."}, [ASK, REPLY]),
    "query_response": ({"query": ASK["content"], "response": "No.", "history": []}, [ASK, REPLY]),
    "input_output": ({"input": ASK["content"], "output": "No."}, [ASK, REPLY]),
    "inputs_targets": ({"inputs": ASK["content"], "targets": "No."}, [ASK, REPLY]),
    "context_response": ({"Context": ASK["content"], "Response": "No."}, [ASK, REPLY]),
    "question_text": ({"questionText": ASK["content"], "answerText": "No."}, [ASK, REPLY]),
    "turns_and_turns": ({"prompt": [SYSTEM, ASK], "completion": [REPLY]}, [SYSTEM, ASK, REPLY]),
    "several_turns_and_text": ({"messages": [ASK, REPLY, ASK], "answer": "No."}, [ASK, REPLY, ASK, REPLY]),
    "turns_and_text": ({"messages": [SYSTEM, ASK], "answer": "No."}, [SYSTEM, ASK, REPLY]),
    "alpaca": (
        {"instruction": "Answer.", "input": "Monday?", "output": "No.", "text": "Below ... Answer. Monday? No."},
        [{"role": "user", "content": "Answer.\n\nMonday?"}, REPLY],
    ),
    "alpaca_without_input": ({"instruction": ASK["content"], "input": "", "output": "No."}, [ASK, REPLY]),
    "alpaca_with_history": (
        {
            "instruction": "And on Tuesday?",
            "output": "Yes.",
            "system": SYSTEM["content"],
            "history": [[ASK["content"], "No."]],
        },
        [SYSTEM, ASK, REPLY, {"role": "user", "content": "And on Tuesday?"}, {"role": "assistant", "content": "Yes."}],
    ),
    "instruction_context_response": (
        {"instruction": "When?", "context": "Open Tuesdays.", "response": "Tuesday", "category": "qa"},
        [{"role": "user", "content": "When?\n\nOpen Tuesdays."}, {"role": "assistant", "content": "Tuesday"}],
    ),
    "sql_with_its_schema": (
        {"question": "How many?", "context": "CREATE TABLE visit (id INTEGER)", "answer": "SELECT 1"},
        [
            {"role": "user", "content": "How many?\n\nCREATE TABLE visit (id INTEGER)"},
            {"role": "assistant", "content": "SELECT 1"},
        ],
    ),
    "answer_is_a_number": ({"question": ASK["content"], "answer": 3}, [ASK, {"role": "assistant", "content": "3"}]),
    "answer_is_an_object": (
        {"input": ASK["content"], "output": {"day": "Mo", "open": False, "n": None}},
        [ASK, {"role": "assistant", "content": '{"day": "Mo", "open": false, "n": null}'}],
    ),
    "answer_is_a_list": (
        {"input": ASK["content"], "output": ["M\u00fcnchen", 1.0]},
        [ASK, {"role": "assistant", "content": '["M\u00fcnchen", 1.0]'}],
    ),
}
PREFERENCES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "texts": ({"prompt": ASK["content"], "chosen": "No.", "rejected": "Yes."}, [ASK, REPLY]),
    "whole_chats": (
        {"prompt": ASK["content"], "chosen": [ASK, REPLY], "rejected": [ASK, ASK], "score_chosen": 8.5},
        [ASK, REPLY],
    ),
    "answer_turns": (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "Yes."}},
        [ASK, REPLY],
    ),
    "whole_chats_behind_a_system_turn": (
        {"prompt": [SYSTEM, ASK], "chosen": [ASK, REPLY], "rejected": [ASK, REPLY]},
        [SYSTEM, ASK, REPLY],
    ),
    "last_exchange_behind_a_history": (
        {"prompt": [ASK, REPLY, ASK], "chosen": [ASK, REPLY], "rejected": [ASK, REPLY]},
        [ASK, REPLY, ASK, REPLY],
    ),
    "prompt_turns": ({"prompt": [SYSTEM, ASK], "chosen": [REPLY], "rejected": [REPLY]}, [SYSTEM, ASK, REPLY]),
    "with_models": (
        {
            "chosen_model": "a rather long name of a model",
            "rejected_model": "b",
            "prompt": ASK["content"],
            "chosen_response": "No.",
            "rejected_response": "Yes.",
        },
        [ASK, REPLY],
    ),
    "openai": (
        {"input": {"messages": [ASK]}, "preferred_output": [REPLY], "non_preferred_output": [ASK]},
        [ASK, REPLY],
    ),
}


@pytest.mark.parametrize("kind", CHATS)
def test_a_chat_is_recognised_without_a_setting(read: Read, kind: str) -> None:
    row, expected = CHATS[kind]
    assert [raw.messages for raw in read(row, row)] == [expected, expected]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_prompt_and_its_answer_are_recognised_without_a_setting(read: Read, kind: str) -> None:
    row, expected = PAIRS[kind]
    assert [raw.messages for raw in read(row, row)] == [expected, expected]


@pytest.mark.parametrize("kind", PREFERENCES)
def test_the_chosen_answer_of_preference_data_is_learnt_and_it_is_said(
    read: Read, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row, expected = PREFERENCES[kind]
    assert [raw.messages for raw in read(row, row)] == [expected, expected]
    assert "preference data: the rejected answer is not used" in capsys.readouterr().out


def test_a_text_and_its_label_are_recognised_where_the_task_is_labels(read: Read, refuse: Refuse) -> None:
    row = {"text": "Where is my parcel?", "label": 3}
    expected = [{"role": "user", "content": "Where is my parcel?"}, {"role": "assistant", "content": "3"}]
    assert read(row, task="labels")[0].messages == expected
    assert "set data.task: labels if label holds categories, or data.prompt_field: text and" in refuse(row)


def test_what_was_taken_is_in_the_log_and_in_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": [HUMAN, GPT], "system": "Be kind."}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"instruction": "Add 1 and 2.", "output": "3"}))
    reader = RowReader(tmp_path, DataConfig(), "raw_data")
    assert len(list(reader.rows())) == 2
    expected = {
        "a.jsonl": 'chats in "conversations"; the system turn in "system"',
        "b.jsonl": '"instruction" as the prompt, "output" as the answer',
    }
    assert reader.layouts == expected
    log = capsys.readouterr().out
    assert all(f"raw_data: {file}: {words}\n" in log for file, words in expected.items())


# Tools.
@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        [FUNCTION],
        json.dumps([FUNCTION]),
        TOOL,
        [{"name": "hours", "description": "Opening hours", "input_schema": FUNCTION["parameters"]}],
    ],
)
def test_the_tools_of_a_row_are_carried_in_one_form(read: Read, tools: object) -> None:
    raw = read({"messages": [ASK, REPLY], "tools": tools})[0]
    assert (raw.messages, raw.tools) == ([ASK, REPLY], [TOOL])


def test_functions_and_tools_of_pairs_are_carried_too(read: Read) -> None:
    assert read({"messages": [ASK, REPLY], "functions": [FUNCTION]})[0].tools == [TOOL]
    assert read({"prompt": ASK["content"], "completion": "No.", "tools": [TOOL]})[0].tools == [TOOL]
    assert read({"messages": [ASK, REPLY], "api": [TOOL]}, tools_field="api")[0].tools == [TOOL]
    for empty in ("", "[]", [], None):
        assert read({"messages": [ASK, REPLY], "tools": empty})[0].tools is None


def test_calls_and_results_in_sharegpts_form(read: Read) -> None:
    call = {"from": "function_call", "value": json.dumps({"name": "hours", "arguments": {"day": "Monday"}})}
    result = {"from": "observation", "value": '{"open": false}'}
    raw = read({"conversations": [HUMAN, call, result, GPT], "tools": json.dumps([FUNCTION])})[0]
    assert raw.messages == [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"open": false}'},
        REPLY,
    ]
    assert raw.tools == [TOOL]


def test_answers_that_are_calls_of_the_rows_tools(read: Read) -> None:
    answers = json.dumps([{"name": "hours", "arguments": {"day": "Monday"}}])
    raw = read({"id": 1, "query": ASK["content"], "answers": answers, "tools": json.dumps([FUNCTION])})[0]
    assert raw.messages == [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}]


@pytest.mark.parametrize("tools", ["hours(day)", [{"description": "no name"}], [7]])
def test_tools_that_cannot_be_read_are_a_fault_and_never_left_out(read: Read, tools: object) -> None:
    assert read({"messages": [ASK, REPLY], "tools": tools})[0].fault == "bad_tools"


# Choices.
def test_of_several_layouts_the_chat_comes_first_and_it_is_said(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": ASK["content"], "messages": [SYSTEM, ASK, REPLY], "text": "<s>Open on Monday? No.</s>"}
    assert read(row)[0].messages == [SYSTEM, ASK, REPLY]
    assert 'chats in "messages", and not "prompt" and "text"' in capsys.readouterr().out


def test_two_chats_or_two_answers_are_refused_with_each_choice(refuse: Refuse) -> None:
    message = refuse({"chat": [ASK, REPLY], "dialog": [ASK, REPLY]})
    assert message.endswith("each hold a chat; set data.messages_field: chat or data.messages_field: dialog")
    message = refuse({"prompt": "a", "question": "b", "response": "c", "answer": "d"})
    for setting in (
        "data.prompt_field: question",
        'data.prompt_template: "{prompt}\\n\\n{question}"',
        "data.response_field: response or data.response_field: answer",
    ):
        assert setting in message


def test_the_types_of_the_fields_are_said_and_never_their_values(refuse: Refuse) -> None:
    message = refuse({"title": "secret", "n": 3, "flag": True, "tags": [1], "meta": {"lang": "de"}, "none": None})
    assert "title (text), n (a number), flag (true or false), tags (a list), meta.lang (text), none (empty)" in message
    assert "secret" not in message


def test_answers_that_are_marked_as_bad_are_not_learnt_unnoticed(read: Read, refuse: Refuse) -> None:
    rows = [{"prompt": f"Open on day {i}?", "completion": "No.", "label": bool(i % 2)} for i in range(6)]
    assert '"label" marks 3 answers as bad, and nothing reads it; set data.keep: {label: true}' in refuse(*rows)
    assert [raw.fault for raw in read(*rows, keep={"label": True})] == ["not_kept", None] * 3
    assert len(read(*rows, ignore_fields=["label"])) == 6
    # Numbers of classes are no verdicts.
    assert len(read(*({**row, "label": i} for i, row in enumerate(rows)))) == 6


@pytest.mark.parametrize(
    "row",
    [
        {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>What is it?"}, REPLY]},
        {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, GPT]},
        {"image": {"bytes": "iVBORw0", "path": "a.png"}, "question": "What is it?", "answer": "A horse"},
        {"videos": ["a.mp4"], "messages": [{"role": "user", "content": "<video>What is it?"}, REPLY]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}, REPLY]},
    ],
)
def test_images_are_refused_by_name(read: Read, row: dict[str, Any]) -> None:
    raw = read(row)[0]
    assert raw.fault == "image_content"
    assert any(name in raw.detail for name in (*row, "image_url"))
    # An address that nothing refers to is no image of the row, and a row may have none.
    assert read({"question": "Price?", "answer": "3", "image": "https://a/b.png", "images": []})[0].fault is None


@pytest.mark.parametrize("path", ["./photos/A 7.JPG", "clips/a.wav", "a.mp4"])
def test_the_path_of_a_file_is_a_medium_of_the_row_unless_the_line_says_otherwise(read: Read, path: str) -> None:
    row = {"prompt": "Describe it.", "target": "A horse", "image_path": path}
    raw = read(row)[0]
    assert raw.fault == "image_content"
    assert raw.detail.endswith("if the texts do not need it, set data.ignore_fields: [image_path]")
    assert read(row, ignore_fields=["image_path"])[0].messages[1]["content"] == "A horse"


def test_an_instruction_by_its_short_name_stands_before_its_input(read: Read) -> None:
    row = {"Instruct": "Name the town.", "Input": "The mill of Ghent turns.", "Output": "Ghent"}
    assert read(row)[0].messages[0]["content"] == "Name the town.\n\nThe mill of Ghent turns."


RENDERED_PAIRS = {
    "chatml": (
        "<|im_start|>system\nYou work at a museum.<|im_end|>\n<|im_start|>user\nOpen on Monday?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "No.<|im_end|>",
    ),
    "chatml_answer_with_its_head": (
        "<|im_start|>system\nYou work at a museum.<|im_end|>\n<|im_start|>user\nOpen on Monday?<|im_end|>\n",
        "<|im_start|>assistant\nNo.<|im_end|>\n",
    ),
    "llama_2": ("<s>[INST] <<SYS>>\nYou work at a museum.\n<</SYS>>\n\nOpen on Monday? [/INST]", " No. </s>"),
}


@pytest.mark.parametrize("kind", RENDERED_PAIRS)
def test_a_prompt_that_was_rendered_for_a_model_is_read_together_with_its_answer(read: Read, kind: str) -> None:
    prompt, answer = RENDERED_PAIRS[kind]
    row = {"prompt": prompt, "completion": answer}
    assert read(row)[0].messages == [SYSTEM, ASK, REPLY]
    assert read(row, prompt_field="prompt", response_field="completion")[0].messages == [SYSTEM, ASK, REPLY]
    # One that is not so written is a fault of that row.
    assert [raw.fault for raw in read(*[row] * 200, {**row, "prompt": "Open?"})][199:] == [None, "bad_rendering"]


def test_turns_as_json_text_with_roles_of_their_own_are_never_learnt_as_json(read: Read) -> None:
    search, result = {"role": "search", "content": "hours Monday"}, {"role": "return", "content": "closed"}
    rows = [
        {"context": json.dumps([ASK]), "response": json.dumps(search)},
        {"context": json.dumps([ASK, search, result]), "response": json.dumps(REPLY)},
    ]
    raws = read(*rows)
    assert [raw.fault for raw in raws] == ["unknown_role"] * 2
    assert all("data.roles: {search: " in raw.detail for raw in raws)
    assert [raw.messages[-1] for raw in read(*rows, roles={"search": "assistant", "return": "tool"})] == [
        {"role": "assistant", "content": "hours Monday"},
        REPLY,
    ]


# What may be read in another way than it is meant.
def test_an_export_of_a_log_in_csv_has_its_turns_as_json_text(tmp_path: Path) -> None:
    def messages(prompt: str, answer: str) -> object:
        (tmp_path / "a.csv").write_text(
            "input,output\n" + ",".join('"{}"'.format(text.replace('"', '""')) for text in (prompt, answer)) + "\n"
        )
        return next(RowReader(tmp_path, DataConfig(), "raw_data").rows()).messages

    assert messages(json.dumps([SYSTEM, ASK]), json.dumps(REPLY)) == [SYSTEM, ASK, REPLY]
    assert messages(json.dumps([SYSTEM, ASK]), json.dumps([REPLY])) == [SYSTEM, ASK, REPLY]
    assert messages(json.dumps([SYSTEM, ASK]), "No.") == [SYSTEM, ASK, REPLY]


def test_a_context_that_the_prompt_holds_already_is_not_written_twice(read: Read) -> None:
    context = "The museum is open from Tuesday to Sunday."
    row = {"prompt": f"Use this: {context}\nOpen on Monday?", "context": context, "response": "No."}
    assert read(row)[0].messages == [{"role": "user", "content": row["prompt"]}, REPLY]
    bare = {**row, "prompt": "Open on Monday?"}
    assert read(bare)[0].messages == [{"role": "user", "content": f"Open on Monday?\n\n{context}"}, REPLY]


def test_an_annotators_verdict_is_no_label(read: Read, refuse: Refuse) -> None:
    rows = [
        {"text": f"Where is {i}?", "label": "parcel", "answer": ("accept", "accept", "reject")[i % 3]} for i in range(9)
    ]
    message = refuse(*rows, task="labels")
    assert '"answer" marks 3 answers as bad' in message
    assert "data.keep: {answer: accept}" in message
    good_rows = [raw for raw in read(*rows, task="labels", keep={"answer": "accept"}) if not raw.fault]
    assert [raw.messages[1]["content"] for raw in good_rows] == ["parcel"] * 6
    # Other words are answers, of which each has a label beside it.
    assert read(*({**row, "answer": "yes"} for row in rows), task="labels")[0].messages[1]["content"] == "yes"


@pytest.mark.parametrize(
    ("values", "keep"),
    [(("thumbs_up", "thumbs_down"), "thumbs_up"), (("True", "False"), "true"), ((1, 0), "true")],
)
def test_verdicts_are_words_too_and_the_setting_has_the_good_one(
    refuse: Refuse, values: tuple[object, object], keep: str
) -> None:
    rows = [{"query": f"Open {i}?", "response": f"No {i}.", "feedback": values[i % 2]} for i in range(6)]
    assert f'"feedback" marks 3 answers as bad, and nothing reads it; set data.keep: {{feedback: {keep}}}' in refuse(
        *rows
    )


def test_the_reasoning_beside_an_answer_goes_before_it(read: Read) -> None:
    row = {"prompt": ASK["content"], "reasoning_content": "Monday is free.", "response": "No."}
    assert read(row)[0].messages == [ASK, {**REPLY, "reasoning_content": "Monday is free."}]
    assert read(row, ignore_fields=["reasoning_content"])[0].messages == [ASK, REPLY]
    # Other names may be about the row.
    assert read({"prompt": ASK["content"], "reasoning": "Free.", "response": "No."})[0].messages == [ASK, REPLY]


def test_turns_with_a_role_of_their_own_are_never_learnt_as_json(read: Read) -> None:
    row = {"prompt": [{"role": "client", "content": "Open on Monday?"}], "completion": "No."}
    settings = {"prompt_field": "prompt", "response_field": "completion"}
    assert read(row, **settings)[0].fault == "unknown_role"
    assert read(row, **settings, roles={"client": "user"})[0].messages == [ASK, REPLY]


def test_a_text_about_a_chat_is_not_lost_behind_it(read: Read, refuse: Refuse) -> None:
    row = {"dialogue": [ASK, REPLY], "summary": "They speak about the museum on Mondays."}
    message = refuse(row)
    assert 'nothing reads "summary", which by the name is the answer to what is in "dialogue"' in message
    assert "data.ignore_fields: [summary]" in message
    template = "Summarize this chat:\n\n{dialogue}"
    assert json.dumps(template) in message
    messages = read(row, prompt_template=template, response_field="summary")[0].messages
    prompt = f"Summarize this chat:\n\n{json.dumps([ASK, REPLY])}"
    assert messages == [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["summary"]}]
    assert read(row, ignore_fields=["summary"])[0].messages == [ASK, REPLY]
    # Under a usual name the chat is what is learnt.
    assert read({"messages": [ASK, REPLY], "summary": row["summary"]})[0].messages == [ASK, REPLY]
