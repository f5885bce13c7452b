"""Three notions of sameness: one prompt to the letter, one conversation by canonical text, one row to the letter."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import pytest

from qlora_retrain.lm import conversations

USER = {"role": "user", "content": "Where is order 1007?"}
ANSWER = {"role": "assistant", "content": "On its way."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "c1", "type": "function", "function": {"name": "track", "arguments": {"order": 1007, "fast": True}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "in transit", "tool_call_id": "c1"}
TOOLS = [{"type": "function", "function": {"name": "track", "parameters": {"b": 1, "a": 2}}}]


def turn(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def test_the_prompt_is_all_before_the_answer_and_the_answer_is_the_last_supervised_turn() -> None:
    chat = [SYSTEM, USER, ANSWER, turn("user", "When?"), turn("assistant", "Today.")]
    assert conversations.prompt_of(chat) == chat[:4]
    assert conversations.answer_of(chat) == "Today."
    # A user turn last has no answer, and a turn of weight 0 is none.
    assert conversations.prompt_of([*chat, turn("user", "Sure?")]) == chat[:4]
    assert conversations.answer_of([*chat[:4], turn("assistant", "No idea.", weight=0)]) == "On its way."
    assert conversations.prompt_of([USER, turn("assistant", "x", weight=0)]) == [USER]


@pytest.mark.parametrize("content", ["", None])
def test_an_answer_of_calls_alone_is_their_canonical_json(content: str | None) -> None:
    chat = [USER, {**CALLING, "content": content}]
    assert conversations.answer_of(chat) == '{"arguments": {"fast": true, "order": 1007}, "name": "track"}'
    assert conversations.answer_of([USER, {**CALLING, "content": "One moment."}]).split("\n")[0] == "One moment."

    # The order of arguments and the call's id make no other answer; another value does.
    call = {"id": "x", "function": {"arguments": {"fast": True, "order": 1007}, "name": "track"}}
    assert conversations.answer_of([USER, {**CALLING, "tool_calls": [call]}]) == conversations.answer_of(chat)
    call["function"]["arguments"]["order"] = 1008  # type: ignore[index]
    assert conversations.answer_of([USER, {**CALLING, "tool_calls": [call]}]) != conversations.answer_of(chat)


def test_a_chat_without_an_assistant_turn_is_all_prompt() -> None:
    assert conversations.prompt_of([USER]) == [USER]
    assert conversations.answer_turn([USER]) is None
    assert conversations.answer_of([]) == ""


def test_canonical_text_is_nfkc_case_folded_with_white_space_collapsed_and_without_system_turns() -> None:
    wide = [SYSTEM, turn("user", "  \uff37here\u00a0is\nORDER \u2460\u2460 ")]
    assert conversations.normalized_text(wide) == "user: where is order 11"
    assert conversations.normalized_text([USER, ANSWER]) == "user: where is order 1007\nassistant: on its way"


@pytest.mark.parametrize(
    "changed",
    [
        [SYSTEM, USER, ANSWER],
        [turn("user", "Where is order 1007? "), ANSWER],
        [turn("user", "where is order 1007?"), ANSWER],
        [turn("user", "Where is order 1007?", name="Ann"), ANSWER],
    ],
)
def test_prompts_that_differ_by_a_letter_or_by_their_system_turn_have_other_keys(changed: list[dict[str, Any]]) -> None:
    assert conversations.prompt_key(changed) != conversations.prompt_key([USER, ANSWER])
    assert conversations.row_id(changed) != conversations.row_id([USER, ANSWER])


def test_a_prompt_is_the_same_whatever_is_answered_and_a_row_is_not() -> None:
    first, second = [USER, ANSWER], [USER, turn("assistant", "Lost.")]
    assert conversations.prompt_key(first) == conversations.prompt_key(second)
    assert conversations.row_id(first) != conversations.row_id(second)


def test_tools_are_part_of_the_prompt_and_of_the_row_in_the_order_they_have() -> None:
    reordered = copy.deepcopy(TOOLS)
    reordered[0]["function"]["parameters"] = {"a": 2, "b": 1}  # type: ignore[index]
    for name in (conversations.prompt_key, conversations.row_id):
        assert len({name([USER, ANSWER], tools) for tools in (None, TOOLS, reordered)}) == 3
        assert name([USER, ANSWER], []) == name([USER, ANSWER])


def test_an_id_is_the_hash_of_turns_and_tools_and_does_not_depend_on_the_order_of_a_turns_fields() -> None:
    text = json.dumps(
        [[{"content": USER["content"], "role": "user"}, {"content": "On its way.", "role": "assistant"}], None]
    )
    assert conversations.row_id([USER, ANSWER]) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert conversations.row_id([{"content": USER["content"], "role": "user"}, ANSWER]) == conversations.row_id(
        [USER, ANSWER]
    )


def test_the_path_of_a_chat_is_a_beginning_of_the_path_of_its_continuation() -> None:
    chat = [SYSTEM, USER, ANSWER]
    longer = [*chat, turn("user", "WHEN?"), CALLING, RESULT, turn("assistant", "Today.")]
    path = conversations.conversation_path(chat)
    assert path == ("user: where is order 1007", "system: be brief")
    assert conversations.conversation_path(longer) == (*path, "user: when")
    # The same question under another instruction shares the first element.
    assert conversations.conversation_path([USER, ANSWER]) == (path[0], "system: ")


def test_texts_without_a_user_turn_are_told_apart_by_what_they_say() -> None:
    paths = {
        conversations.conversation_path([turn("assistant", text)]) for text in ("One day", "Two  days", "two days")
    }
    assert paths == {("assistant: one day",), ("assistant: two days",)}
    # Where the system turn alone asks, it comes first.
    assert conversations.conversation_path([SYSTEM, ANSWER]) == ("system: be brief", "assistant: on its way")


def test_a_later_system_turn_stands_where_it_is_in_the_path_and_an_unsupervised_end_does_not() -> None:
    late = turn("system", "Now be polite.")
    chat = [SYSTEM, USER, ANSWER, late, turn("user", "When?"), turn("assistant", "Today.")]
    beginning = conversations.conversation_path([SYSTEM, USER, ANSWER])
    assert conversations.conversation_path(chat) == (*beginning, "system: now be polite", "user: when")
    # Before the first answer all system turns are one element, wherever they stand.
    assert conversations.conversation_path([USER, SYSTEM, ANSWER]) == beginning

    greeting = turn("assistant", "Hello!")
    silent = [greeting, USER, {**ANSWER, "weight": 0}]
    assert conversations.conversation_path(silent) == conversations.conversation_path([greeting])
    assert conversations.greeting_of(silent) == [greeting]
    assert not conversations.greeting_of([{**greeting, "weight": 0}, USER, ANSWER])
    assert not conversations.greeting_of([greeting])


@pytest.mark.parametrize(
    "text",
    [
        "where's my order - the blue one",
        "Where\u2019s my order - the blue one?",
        "where\u02bcs my  order \u2014 the blue one!!",
        "where's my order \u2013 the blue one\u2026",
        "Where's\u200b my\u00ad order - the blue\ufe0f one \uff1f",
        "\ufeffwhere's my order - the blue one.",
        "where\u00b4s my order \u2212 the\u00a0blue one \u061f",
    ],
)
def test_typography_and_what_nobody_sees_do_not_change_a_conversations_side(text: str) -> None:
    assert conversations.canonical_text(text) == "where's my order - the blue one"


@pytest.mark.parametrize(
    ("first", "second"), [("?", "!"), ("don't", "dont"), ("a-b", "ab"), ("\u0915", "\u0916"), ("5", "6")]
)
def test_texts_that_a_reader_tells_apart_stay_apart(first: str, second: str) -> None:
    assert conversations.canonical_text(first) != conversations.canonical_text(second)
