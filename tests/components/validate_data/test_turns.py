"""Turns of other projects become this project's form; what cannot be read says which turn, which key and what near."""

from __future__ import annotations

import json
from typing import Any

import pytest

from components.validate_data.roles import ROLES
from components.validate_data.turns import TurnParser
from components.validate_data.values import RowFault

ASK = {"role": "user", "content": "Is the museum open on Monday?"}
REPLY = {"role": "assistant", "content": "No, it closes on Mondays."}
CALL = {"type": "function", "function": {"name": "opening_hours", "arguments": {"day": "Monday", "days": [1, 2]}}}


def parse(value: object, **roles: str) -> list[dict[str, Any]]:
    return TurnParser(roles, ()).parse(value)[0]


def fault(value: object, ignore: tuple[str, ...] = (), **roles: str) -> tuple[str, str]:
    with pytest.raises(RowFault) as caught:
        TurnParser(roles, ignore).parse(value)
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize(
    ("role", "content"),
    [("from", "value"), ("role", "content"), ("speaker", "text"), ("author", "message"), ("sender", "utterance")],
)
def test_the_keys_of_a_turn_may_have_other_names(role: str, content: str) -> None:
    foreign = [{role: turn["role"], content: turn["content"]} for turn in (ASK, REPLY)]
    assert parse(foreign) == [ASK, REPLY]


@pytest.mark.parametrize(
    ("role", "names"),
    {
        "system": "system developer System",
        "user": "user human customer prompter USER",
        "assistant": "assistant gpt chatgpt bing bard bot model ai Chatbot",
        "tool": "tool function observation function_response function-response ipython tool_response",
    }.items(),
)
def test_roles_are_recognised_whatever_their_letter_case(role: str, names: str) -> None:
    assert [parse([{"from": name, "value": "x"}])[0]["role"] for name in names.split()] == [role] * len(names.split())


def test_a_role_of_ones_own_is_set_and_wins_over_a_recognised_one() -> None:
    turns = [{"role": "Client", "content": "hello"}, {"role": "model", "content": "be kind"}]
    assert [t["role"] for t in parse(turns, client="user", model="system")] == ["user", "system"]
    assert parse([{"role": 0, "content": "hello"}], **{"0": "user"}) == [{"role": "user", "content": "hello"}]


def test_an_unknown_role_is_named_with_the_near_match_and_the_setting() -> None:
    reason, detail = fault([ASK, {"role": "assistent", "content": "secret text"}])
    assert reason == "unknown_role"
    assert detail == (
        'turn 2: the role "assistent"; did you mean assistant?; say what it is, e.g. data.roles: {assistent: assistant}'
    )
    # Every role of the chat that needs the setting.
    turns = [{"speaker": name, "text": "hi"} for name in ("Client", "Advisor", "Client")]
    assert fault(turns)[1] == (
        'turn 1: the role "Client" and "Advisor"; say what it is, e.g. data.roles: {Client: user, Advisor: assistant}'
    )
    # A whole text in the place of a role is cut.
    assert len(fault([{"role": "x" * 500, "content": "y"}])[1]) < 200
    assert fault([{"role": ["user"], "content": "hi"}]) == ("unknown_role", "turn 1: the role is a list")


@pytest.mark.parametrize("names", [("YOU", "THEM"), ("anna", "bert"), ("Agent7", "Kunde")])
def test_pairs_of_a_speaker_and_a_text_are_no_exchanges(names: tuple[str, str]) -> None:
    pairs = [[names[i % 2], f"line {i}"] for i in range(4)]
    assert fault(pairs)[0] == "unknown_role"
    assert all(f"{name}: " in fault(pairs)[1] for name in names)
    messages = parse(pairs, **dict(zip(names, ("user", "assistant"), strict=True)))
    assert [(m["role"], m["content"]) for m in messages] == [
        ("user", "line 0"), ("assistant", "line 1"), ("user", "line 2"), ("assistant", "line 3")
    ]  # fmt: skip


def test_exchanges_pairs_and_texts_in_turn_are_chats() -> None:
    hello, reply = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
    assert parse([{"human": "hello", "assistant": "hi"}]) == [hello, reply]
    assert parse([{"system": "", "input": "hello", "output": "hi"}]) == [hello, reply]
    assert parse([{"system": "Be kind.", "input": "hello", "output": "hi", "output_with_loss": False}]) == [
        {"role": "system", "content": "Be kind."},
        hello,
        {**reply, "weight": 0},
    ]
    assert parse([{"user": "hello"}, {"assistant": "hi"}]) == [hello, reply]
    assert parse([["hello", "hi"], ["hello", "hi"]]) == [hello, reply, hello, reply]
    assert parse([["human", "hello"], ["gpt", "hi"]]) == [hello, reply]
    assert parse(["hello", "hi"]) == [hello, reply]
    # A list of objects as an object of lists, which a column of Parquet may be.
    assert parse({"from": ["human", "gpt"], "value": ["hello", "hi"]}) == [hello, reply]


def test_an_exchange_keeps_every_text_or_is_refused() -> None:
    assert parse([{"instruction": "Add.", "input": "1 2", "output": "3"}])[0]["content"] == "Add.\n\n1 2"
    assert fault([{"question": "a", "prompt": "b", "answer": "c"}])[0] == "extra_field"


def test_a_chat_may_be_json_text_or_what_pandas_writes_for_a_list() -> None:
    turns = [ASK, {**REPLY, "weight": None, "content": 'It\'s "closed"\n'}]
    expected = [ASK, {"role": "assistant", "content": 'It\'s "closed"\n'}]
    assert parse(json.dumps(turns)) == parse(repr(turns)) == expected
    reason, detail = fault("User: hello\nBot: hi")
    assert reason == "bad_json"
    assert "data.text_field" in detail
    # As NumPy prints an array of objects, without commas.
    assert "NumPy" in fault(f"[{ASK!r}\n {REPLY!r}]")[1]


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        ({"role": "user"}, "not_a_list", "an object"),
        (7, "not_a_list", "a number"),
        (["text"], "not_a_turn", "turn 1: text"),
        ([ASK, {"role": "user"}], "not_a_turn", "turn 2: its keys are: role"),
        ([{"rolle": "user", "content": "x"}], "not_a_turn", "turn 1: its keys are: rolle, content"),
        ([ASK, {"role": "assistant", "content": None}], "bad_content_type", "turn 2: the content is null"),
    ],
)
def test_what_is_no_turn_says_what_it_is(value: object, reason: str, detail: str) -> None:
    assert fault(value) == (reason, detail)


def test_text_parts_are_joined_with_nothing_between() -> None:
    parts = [{"type": "text", "text": "Is it "}, {"text": "open"}, "?", {"type": "input_text", "text": " "}]
    assert parse([{"role": "user", "content": parts}]) == [{"role": "user", "content": "Is it open? "}]
    # Gemini's form.
    assert parse([{"role": "model", "parts": [{"text": "a"}, {"text": "b"}]}])[0]["content"] == "ab"
    # Parquet gives every part the keys of all others.
    padded = [{"type": "text", "text": "a", "image_url": None}]
    assert parse([{"role": "user", "content": padded}])[0]["content"] == "a"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "input_audio", "input_audio": {}},
        {"type": "video", "video": "a.mp4"},
        {"type": "image"},
        {"inlineData": {"mimeType": "image/png"}},
    ],
)
def test_media_among_the_parts_are_refused_by_name(part: dict[str, Any]) -> None:
    reason, detail = fault([{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}])
    kind = part.get("type") or next(iter(part))
    assert (reason, detail) == ("image_content", f'turn 1: a part of type "{kind}"')


def test_a_part_that_is_no_text_is_refused_and_a_list_that_is_the_answer_is_json() -> None:
    reason, detail = fault([{"role": "assistant", "content": [{"type": "server_tool_use", "name": "f", "input": {}}]}])
    assert reason == "bad_content_type"
    assert detail.startswith('turn 1: a part of type "server_tool_use"; write calls as tool_calls')
    entities = [{"type": "city", "text": "K\u00f6ln"}, {"type": "day", "text": "Monday"}]
    content = parse([{"role": "assistant", "content": entities}])[0]["content"]
    assert content == '[{"type": "city", "text": "K\u00f6ln"}, {"type": "day", "text": "Monday"}]'


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (3.0, "3.0"), (True, "true"), ({"b": 1, "a": None}, '{"b": 1, "a": null}')]
)
def test_contents_that_are_values_are_json(value: object, text: str) -> None:
    assert parse([ASK, {"role": "assistant", "content": value}])[1]["content"] == text


@pytest.mark.parametrize("arguments", [CALL["function"]["arguments"], json.dumps(CALL["function"]["arguments"])])  # type: ignore[index]
def test_calls_have_their_arguments_as_an_object(arguments: object) -> None:
    function = {"name": "opening_hours", "arguments": arguments}
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    openai = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    assert parse([openai]) == [{**expected, "tool_calls": [{**CALL, "id": "c1"}]}]
    assert parse([{"role": "assistant", "tool_calls": json.dumps([{"function": function}])}]) == [expected]
    assert parse([{"role": "assistant", "content": None, "function_call": function, "tool_calls": None}]) == [expected]
    assert parse([{"from": "function_call", "value": json.dumps(function)}]) == [expected]
    assert parse([{"from": "tool_call", "value": json.dumps([function])}]) == [expected]


def test_results_of_tools_keep_whose_they_are() -> None:
    assert parse([{"role": "tool", "tool_call_id": "c1", "name": "f", "content": {"open": False}}]) == [
        {"role": "tool", "content": '{"open": false}', "name": "f", "tool_call_id": "c1"}
    ]
    assert parse([{"from": "observation", "value": ""}]) == [{"role": "tool", "content": ""}]


@pytest.mark.parametrize(
    ("turn", "detail"),
    [
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "{day: Monday"}}]},
            'the call of "f": text that is not JSON',
        ),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
            'the call of "f" are a list; expected an object',
        ),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "a call without a name"),
        ({"tool_calls": ["f"]}, "a call: text that is not JSON"),
    ],
)
def test_a_call_that_cannot_be_read_is_a_fault(turn: dict[str, Any], detail: str) -> None:
    reason, words = fault([ASK, {"role": "assistant", "content": None, **turn}])
    assert reason == "bad_tool_call"
    assert words.startswith("turn 2: ")
    assert words.endswith(detail)


def test_tools_in_the_system_turn_travel_with_the_row() -> None:
    function = {"name": "opening_hours", "parameters": {"type": "object"}}
    turns = [{"role": "system", "content": "", "tools": json.dumps([function])}, ASK, REPLY]
    messages, tools = TurnParser({}, ()).parse(turns)
    assert (messages, tools) == ([ASK, REPLY], [{"type": "function", "function": function}])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_carried_apart_from_the_answer(key: str) -> None:
    assert parse([{**REPLY, key: "It is Monday."}]) == [{**REPLY, "reasoning_content": "It is Monday."}]
    assert parse([{**REPLY, key: ""}]) == [REPLY]
    part = {"type": "thinking", "thinking": "It is Monday."}
    content = [part, {"type": "text", "text": REPLY["content"]}]
    assert parse([{"role": "assistant", "content": content}]) == [{**REPLY, "reasoning_content": "It is Monday."}]


@pytest.mark.parametrize(
    ("key", "value"), [("weight", 0), ("weight", 0.0), ("train", False), ("loss", False), ("trainable", 0)]
)
def test_a_turn_that_is_not_to_be_learnt_has_weight_0(key: str, value: object) -> None:
    assert parse([{**REPLY, key: value}]) == [{**REPLY, "weight": 0}]
    assert parse([{**REPLY, key: 1}]) == [REPLY]
    assert parse([{**ASK, key: value}]) == [ASK]


def test_a_weight_between_0_and_1_is_a_fault() -> None:
    assert fault([{**REPLY, "weight": 0.5}]) == ("bad_weight", 'turn 1: a number in "weight"')


def test_keys_that_say_something_about_a_turn_are_ignored_and_counted() -> None:
    parser = TurnParser({}, ())
    meta = {
        "id": "8f14e45f-ceea-467f-9e0d-" + "0" * 80,
        "timestamp": "2026-01-02",
        "tokens": 12,
        "emotion": "calm",
        "refusal": None,
        "annotations": [],
        "metadata": {"source": "shop", "agent": 7},
        "value": REPLY["content"],
    }
    assert parser.parse([ASK, {**REPLY, **meta}])[0] == [ASK, REPLY]
    assert parser.ignored_keys == {"id": 1, "timestamp": 1, "tokens": 1, "emotion": 1, "metadata": 1}


def test_a_text_that_nothing_reads_is_a_fault_unless_it_is_left_out_on_purpose() -> None:
    turn = {**ASK, "context": "The museum is open from Tuesday to Sunday, from ten to five."}
    setting = "to lose its text, set data.ignore_fields: "
    assert fault([turn, REPLY]) == ("extra_field", f'turn 1: the key "context" (text); {setting}[context]')
    assert TurnParser({}, ("context",)).parse([turn, REPLY])[0] == [ASK, REPLY]
    # All of them at once, since each needs the setting.
    documents, calls = (
        {"documents": ["one"], "tool_calls": [CALL]},
        'the key "documents" (a list) and "tool_calls" (a list)',
    )
    assert fault([{**ASK, **documents}, REPLY])[1] == f"turn 1: {calls}; {setting}[documents, tool_calls]"


def test_reasoning_of_a_user_is_never_taken_for_metadata() -> None:
    reason, detail = fault([{**ASK, "reasoning_content": "hm"}, REPLY])
    assert (reason, detail[:37]) == ("extra_field", 'turn 1: the key "reasoning_content" (')


def test_an_empty_system_turn_falls_away_and_any_order_is_let_in() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert parse([{"role": "system", "content": " \n"}, ASK, REPLY]) == [ASK, REPLY]
    for turns in ([REPLY, ASK], [ASK, ASK, REPLY], [ASK, system, REPLY, ASK], [ASK, REPLY, REPLY]):
        assert parse(turns) == turns


def test_every_recognised_role_has_a_form_of_its_own() -> None:
    assert set(ROLES.values()) == {"system", "user", "assistant", "tool", "call"}


def test_langchains_turns_are_read_in_both_of_its_forms() -> None:
    turns = [("human", ASK["content"]), ("ai", REPLY["content"])]
    assert parse([{"type": role, "content": text, "response_metadata": {"n": {"m": 1}}} for role, text in turns]) == [
        ASK,
        REPLY,
    ]
    assert parse([{"type": role, "data": {"content": text, "type": role, "id": None}} for role, text in turns]) == [
        ASK,
        REPLY,
    ]
    # A part of a content has a type too.
    assert fault([{"type": "text", "text": "hi"}])[0] == "not_a_turn"


def test_numbers_are_roles_with_the_setting_written_so_that_yaml_reads_texts() -> None:
    turns = {"speaker": [0, 1, 0], "utterance": ["a", "b", "c"]}
    assert 'data.roles: {"0": user, "1": assistant}' in fault(turns)[1]
    assert [turn["role"] for turn in parse(turns, **{"0": "user", "1": "assistant"})] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("Client", "Operator"), "{Client: user, Operator: assistant}"),
        (("student", "teacher"), "{student: user, teacher: assistant}"),
        (("A", "B"), "{A: user, B: assistant}"),
        # Who asks is known.
        (("user", "Zed"), "{Zed: assistant}"),
    ],
)
def test_the_likely_roles_are_in_the_setting(names: tuple[str, str], roles: str) -> None:
    assert fault([{"speaker": name, "text": "hi"} for name in names])[1].endswith(f"data.roles: {roles}")


def test_ids_and_times_of_turns_are_metadata_as_databases_write_them() -> None:
    extras = {
        "_id": {"$oid": "65a"},
        "createdAt": {"$date": "2026-01-01T00:00:00Z"},
        "frames": [{"slots": ["a b c d"]}],
    }
    assert parse([{**ASK, **extras}, {**REPLY, **extras}]) == [ASK, REPLY]


def test_a_tree_of_turns_is_no_chat() -> None:
    tree = [{"text": "a?", "role": "prompter", "replies": [{"text": "b", "role": "assistant", "replies": []}]}]
    assert fault(tree)[0] == "branching_chat"
    assert parse([{**ASK, "replies": []}, REPLY]) == [ASK, REPLY]


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "input"])
def test_the_arguments_of_calls_have_several_names(key: str) -> None:
    call = {"name": "opening_hours", key: {"day": "Monday", "days": [1, 2]}, "type": "tool_call"}
    assert parse([{"role": "assistant", "content": "", "tool_calls": [call]}])[0]["tool_calls"] == [CALL]


def test_a_call_whose_arguments_nothing_reads_is_a_fault() -> None:
    call = {"name": "opening_hours", "kwargs": {"day": "Monday"}}
    reason, detail = fault([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert (reason, "kwargs" in detail) == ("bad_tool_call", True)
