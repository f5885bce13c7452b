"""Texts that were rendered for a model are read back into their turns; the texts are written by hand, a style each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.validate_data.raw_rows import RowReader
from components.validate_data.rendered import style_of
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError

SYSTEM = {"role": "system", "content": "You work at a museum.\nBe brief."}
ASK = {"role": "user", "content": "Open on Monday?\n\nAnd on <b>Tuesday</b>?"}
REPLY = {"role": "assistant", "content": "No, and yes:\n- from ten to five"}
AGAIN, LAST = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}
CHAT = [SYSTEM, ASK, REPLY, AGAIN, LAST]


def chatml(chat: list[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in chat)


def llama_3(chat: list[dict[str, str]]) -> str:
    turns = "".join(f"<|start_header_id|>{t['role']}<|end_header_id|>\n\n{t['content']}<|eot_id|>" for t in chat)
    return f"<|begin_of_text|>{turns}"


def zephyr(chat: list[dict[str, str]]) -> str:
    return "".join(f"<|{t['role']}|>\n{t['content']}</s>\n" for t in chat)


def phi_3(chat: list[dict[str, str]]) -> str:
    return "".join(f"<|{t['role']}|>\n{t['content']}<|end|>\n" for t in chat) + "<|endoftext|>"


def llama_2(chat: list[dict[str, str]]) -> str:
    system, first, *others = chat
    text = f"<s>[INST] <<SYS>>\n{system['content']}\n<</SYS>>\n\n{first['content']} [/INST] {others[0]['content']} </s>"
    return f"{text}<s>[INST] {others[1]['content']} [/INST] {others[2]['content']} </s>"


def messages(folder: Path, *rows: dict[str, Any], **settings: Any) -> list[Any]:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2), encoding="utf-8")
    reader = RowReader(folder, DataConfig(**settings), "raw_data")
    return [(raw.messages, raw.fault) for raw in reader.rows()][: len(rows)]


@pytest.mark.parametrize("render", [chatml, llama_3, zephyr, phi_3, llama_2])
def test_the_turns_of_a_rendered_text_are_learnt_as_a_chat(tmp_path: Path, render: Any) -> None:
    row = {"text": render(CHAT), "source": "museum"}
    assert messages(tmp_path, row, {"text": render([SYSTEM, AGAIN, LAST, ASK, REPLY])}) == [
        (CHAT, None),
        ([SYSTEM, AGAIN, LAST, ASK, REPLY], None),
    ]


@pytest.mark.parametrize("beginning", ["", "\n\n"])
def test_paragraphs_of_two_speakers_are_their_turns(tmp_path: Path, beginning: str) -> None:
    text = f"{beginning}Human: Open on Monday?\n\nAssistant: No.\n\nHuman: Sure?\n\nAssistant: Yes,\nit is shut."
    contents = ["Open on Monday?", "No.", "Sure?", "Yes,\nit is shut."]
    chat = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    rejected = text.replace("Yes,\nit is shut.", "No.")
    assert messages(tmp_path, {"chosen": text, "rejected": rejected}) == [(chat, None)]
    assert messages(tmp_path, {"text": text}) == [(chat, None)]


def test_two_speakers_beside_a_label_may_be_what_is_labelled(tmp_path: Path) -> None:
    row = {"text": "Human: Open?\n\nAssistant: No.", "label": "polite"}
    with pytest.raises(UsageError, match=r"data\.task: labels if label holds categories"):
        messages(tmp_path, row)
    assert messages(tmp_path, row, task="labels")[0][0][1]["content"] == "polite"


@pytest.mark.parametrize(
    "text",
    ["Note.\n\nHuman: Open?\n\nAssistant: No.", "Human: Open?\n\nHuman: Hello?\n\nAssistant: No.", "Assistant: No."],
)
def test_what_is_not_two_speakers_in_turn_stays_a_text(text: str) -> None:
    assert style_of([text]) is None


@pytest.mark.parametrize(
    "text",
    ["Human: Open?\n\nAssistant: ", "<|im_start|>user\nOpen?<|im_end|>\n<|im_start|>assistant\n"],
    ids=["speakers", "ChatML"],
)
def test_texts_that_stop_before_the_answer_are_prompts_no_chats(text: str) -> None:
    assert style_of([text, text]) is None


def test_the_names_of_speakers_in_a_prompt_stay_in_it(tmp_path: Path) -> None:
    row = {"prompt": "Human: Open on Monday?\n\nAssistant:", "completion": " No."}
    assert messages(tmp_path, row)[0][0][0]["content"] == row["prompt"]


def test_gemma_has_no_system_turn_and_its_own_role(tmp_path: Path) -> None:
    turns = (("user", ASK), ("model", REPLY))
    text = "<bos>" + "".join(f"<start_of_turn>{role}\n{t['content']}<end_of_turn>\n" for role, t in turns)
    assert messages(tmp_path, {"text": text}) == [([ASK, REPLY], None)]


def test_the_chosen_text_of_preference_data_is_read_too(tmp_path: Path) -> None:
    row = {"prompt": ASK["content"], "chosen": chatml([ASK, REPLY]), "rejected": chatml([ASK, LAST])}
    assert messages(tmp_path, row) == [([ASK, REPLY], None)]


def test_the_last_end_may_be_missing(tmp_path: Path) -> None:
    assert messages(tmp_path, {"text": chatml([ASK, REPLY]).removesuffix("<|im_end|>\n")}) == [([ASK, REPLY], None)]


@pytest.mark.parametrize(
    "text",
    [
        "The mark <|im_start|> begins a turn.",
        f"Note.\n{chatml([ASK, REPLY])}",
        f"{chatml([ASK, REPLY])}Note.",
        f"<|im_start|>user\n{ASK['content']}\n{chatml([REPLY])}",
        chatml([ASK]),
        "[INST] no end",
        "<s>[INST] a [INST] b [/INST] c </s>",
    ],
)
def test_a_text_that_is_not_turns_throughout_stays_a_text(text: str) -> None:
    assert style_of([chatml([ASK, REPLY]), text]) is None
    assert style_of([text]) is None


def test_among_rendered_texts_another_one_is_a_fault_of_its_row(tmp_path: Path) -> None:
    rows = [{"text": chatml([{**ASK, "content": f"Open on day {i}?"}, REPLY])} for i in range(250)]
    results = messages(tmp_path, *rows, {"text": "A note."})
    assert [fault for _, fault in results] == [None] * 250 + ["bad_rendering"]


def test_a_field_that_a_person_names_as_a_text_is_one(tmp_path: Path) -> None:
    text = chatml([ASK, REPLY])
    assert messages(tmp_path, {"text": text}, text_field="text") == [([{"role": "assistant", "content": text}], None)]
