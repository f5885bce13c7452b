"""Calls and results that other APIs write as parts of a content become the OpenAI form, in the order of the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.validate_data.raw_rows import read_rows
from components.validate_data.turns import TurnParser
from components.validate_data.values import RowFault
from qlora_retrain.config.data import DataConfig

SEATS = {"free": 14, "rows": ["B", "C"]}
# Each API's names for one call and its result.
ANTHROPIC = (
    {"type": "tool_use", "id": "k7", "name": "seats", "input": {"hall": "north"}},
    {"type": "tool_result", "tool_use_id": "k7", "content": json.dumps(SEATS)},
)
BEDROCK = (
    {"toolUse": {"toolUseId": "k7", "name": "seats", "input": {"hall": "north"}}},
    {"toolResult": {"toolUseId": "k7", "content": [{"json": SEATS}], "status": "success"}},
)
GEMINI = (
    {"functionCall": {"id": "k7", "name": "seats", "args": {"hall": "north"}}},
    {"functionResponse": {"id": "k7", "name": "seats", "response": SEATS}},
)


def parse(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return TurnParser({}, ()).parse(turns)[0]


def fault(role: str, *parts: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(RowFault) as caught:
        parse([{"role": role, "content": list(parts)}])
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize("parts", [ANTHROPIC, BEDROCK, GEMINI], ids=["anthropic", "bedrock", "gemini"])
def test_a_call_and_its_result_are_turns_of_their_own_in_every_api(
    parts: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    call, result = parts
    name = {"name": "seats"} if "functionResponse" in result else {}
    assert parse(
        [
            {"role": "user", "content": [{"text": "Is there a seat in the north hall?"}]},
            {"role": "assistant", "content": [{"text": "I shall look."}, call]},
            {"role": "user", "content": [result]},
            {"role": "assistant", "content": [{"text": "Yes, in rows B and C."}]},
        ]
    ) == [
        {"role": "user", "content": "Is there a seat in the north hall?"},
        {
            "role": "assistant",
            "content": "I shall look.",
            "tool_calls": [
                {"type": "function", "function": {"name": "seats", "arguments": {"hall": "north"}}, "id": "k7"}
            ],
        },
        {"role": "tool", "content": '{"free": 14, "rows": ["B", "C"]}', "tool_call_id": "k7"} | name,
        {"role": "assistant", "content": "Yes, in rows B and C."},
    ]


def test_several_calls_and_several_results_keep_their_order_and_a_text_behind_results_is_the_users() -> None:
    calls = [{"type": "tool_use", "id": f"k{i}", "name": "seats", "input": {"row": i}} for i in range(3)]
    results = [{"type": "tool_result", "tool_use_id": f"k{i}", "content": str(i)} for i in range(3)]
    messages = parse(
        [
            {"role": "assistant", "content": calls},
            {"role": "user", "content": [*results, {"type": "text", "text": "And the south hall?"}]},
        ]
    )
    assert [call["function"]["arguments"] for call in messages[0]["tool_calls"]] == [{"row": i} for i in range(3)]
    assert messages[0]["content"] == ""
    assert [(m["content"], m["tool_call_id"]) for m in messages[1:4]] == [("0", "k0"), ("1", "k1"), ("2", "k2")]
    assert messages[4:] == [{"role": "user", "content": "And the south hall?"}]


def test_reasoning_in_front_of_a_call_stays_reasoning() -> None:
    thought = {"type": "thinking", "thinking": "The plan lists the halls.", "signature": "Zx9"}
    (message,) = parse([{"role": "assistant", "content": [thought, ANTHROPIC[0]]}])
    assert (message["reasoning_content"], message["content"]) == ("The plan lists the halls.", "")
    assert len(message["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("full", "full"),
        ([{"type": "text", "text": "row B, "}, {"type": "text", "text": "row C"}], "row B, row C"),
        ([{"text": "rows: "}, {"json": ["B"]}], 'rows: ["B"]'),
        ({"free": 0}, '{"free": 0}'),
        ([{"row": "B"}, {"row": "C"}], '[{"row": "B"}, {"row": "C"}]'),
    ],
)
def test_a_result_is_text_however_it_is_written(content: object, text: str) -> None:
    result = {"type": "tool_result", "tool_use_id": "k7", "content": content}
    assert parse([{"role": "user", "content": [result]}]) == [{"role": "tool", "content": text, "tool_call_id": "k7"}]


@pytest.mark.parametrize(
    ("role", "parts", "reason", "words"),
    [
        ("user", [ANTHROPIC[0]], "bad_content_type", "a call or a result in a turn of the user"),
        ("assistant", [ANTHROPIC[1]], "bad_content_type", "a call or a result in a turn of the assistant"),
        ("assistant", [ANTHROPIC[0], {"type": "text", "text": "Wait."}], "bad_content_type", "a text behind a call"),
        ("user", [{"type": "text", "text": "Here:"}, ANTHROPIC[1]], "bad_content_type", "a text in front of"),
        ("user", [{**ANTHROPIC[1], "note": "x"}], "bad_content_type", 'with the key "note"'),
        ("assistant", [{"type": "tool_use", "id": "k7", "input": {}}], "bad_tool_call", "name"),
        (
            "user",
            [{**ANTHROPIC[1], "content": [{"type": "image", "source": {}}]}],
            "image_content",
            'a result with a part of type "image"',
        ),
    ],
)
def test_what_the_openai_form_could_not_hold_is_refused(
    role: str, parts: list[dict[str, Any]], reason: str, words: str
) -> None:
    assert fault(role, *parts)[0] == reason
    assert words in fault(role, *parts)[1]


def test_parts_without_calls_are_left_alone() -> None:
    entities = [{"type": "city", "text": "K\u00f6ln"}, {"type": "day", "text": "Monday"}]
    assert json.loads(parse([{"role": "assistant", "content": entities}])[0]["content"]) == entities


SEATS_TOOL = {"name": "seats", "description": "Free seats"}
SCHEMA = {"type": "object", "properties": {"hall": {"type": "string"}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{**SEATS_TOOL, "input_schema": SCHEMA}]),
        ("tools", [{"functionDeclarations": [{**SEATS_TOOL, "parameters": SCHEMA}]}]),
        ("toolConfig", {"tools": [{"toolSpec": {**SEATS_TOOL, "inputSchema": {"json": SCHEMA}}}]}),
        ("tool_config", {"tools": [{"toolSpec": {**SEATS_TOOL, "inputSchema": SCHEMA}}]}),
    ],
)
def test_the_tools_of_every_api_are_those_of_the_row(tmp_path: Path, field: str, value: object) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], field: value}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (raw_row,) = read_rows(tmp_path, DataConfig(), "raw_data")
    assert raw_row.tools == [{"type": "function", "function": {**SEATS_TOOL, "parameters": SCHEMA}}]
