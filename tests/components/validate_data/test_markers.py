"""A whole text is cut at its marker; markers that older formats left at the ends of rows are warned of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.validate_data.markers import EndMarkers, split_text, suggest_marker
from components.validate_data.raw_rows import RowReader
from components.validate_data.values import RowFault
from qlora_retrain.config.data import DataConfig

ALPACA = "Below is an instruction.\n\n### Instruction:\nSay what ### Response: means.\n\n### Response:\nA mark.\n"


@pytest.mark.parametrize(
    ("text", "marker", "prompt"),
    [
        (ALPACA, "### Response:", ALPACA.removesuffix("\nA mark.\n")),
        # The last beginning of a line counts, and a mention within a line does not.
        ("Q: a\nA: b\nQ: c\nA: the letter A: d", "A:", "Q: a\nA: b\nQ: c\nA:"),
        # Where no line begins with it, the last one counts.
        ("<s>[INST] hello [/INST] hi", "[/INST]", "<s>[INST] hello [/INST]"),
    ],
)
def test_a_text_is_cut_behind_its_marker_and_nothing_is_lost(text: str, marker: str, prompt: str) -> None:
    assert split_text(text, marker) == (prompt, text.removeprefix(prompt))


def test_the_white_space_before_a_label_belongs_to_the_prompt() -> None:
    assert split_text("Parcel?\nLabel: \n refund", "Label:", is_label=True) == ("Parcel?\nLabel: \n ", "refund")


def test_a_text_without_the_marker_says_what_is_near() -> None:
    with pytest.raises(RowFault) as caught:
        split_text("### Instruction:\nAdd.\n\n### Respones:\n3", "### Response:")
    assert (caught.value.reason, caught.value.detail) == ("no_marker", "did you mean '### Respones:'?")


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("### Human: Hello### Assistant: Hi### Human: Bye", "### Assistant:"),
        ("User: Hello\nBot: Hi\nUser: Bye\n", "Bot:"),
        ("<|user|>\nHello\n<|bot|>\nHi\n<|user|>\nBye", "<|bot|>"),
    ],
)
def test_a_text_that_goes_on_after_the_answer_is_a_fault(text: str, marker: str) -> None:
    with pytest.raises(RowFault) as caught:
        split_text(text, marker)
    assert caught.value.reason == "text_goes_on"
    # An answer may say the word.
    assert split_text(f"User: Hello\n{marker} Dear User: hi", marker)[1] == " Dear User: hi"


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        (ALPACA.replace(" what ### Response:", ""), "### Response:"),
        ("### Human: Hello### Assistant: Hi", "### Assistant:"),
        ("[INST] Hello [/INST] Hi", "[/INST]"),
        ("<|user|>Hello<|assistant|>Hi", "<|assistant|>"),
        ("USER: Hello\nASSISTANT: Hi", "ASSISTANT:"),
        ("The museum opened in 1907.", None),
        ("### Instru\u00e7\u00e3o:\nAbre?\n\n### Resposta:\nN\u00e3o.", "### Resposta:"),
        ("## \u554f:\nOpen?\n## \u7b54: No.", "## \u7b54:"),
        ("### Notes:\nThe museum opened in 1907.", None),
    ],
)
def test_the_marker_of_most_texts_is_suggested(text: str, marker: str | None) -> None:
    assert suggest_marker([text] * 4 + ["Something else."]) == marker


@pytest.mark.parametrize(
    "marker", ["###", " END", "</s>", "<|endoftext|>", "<eos>", "<end_of_turn>", "[EOS]", " STOP", "%%%", "\n\n###\n\n"]
)
def test_a_marker_at_the_end_of_most_answers_is_a_warning(marker: str) -> None:
    ends = EndMarkers()
    for i in range(10):
        ends.add(f"Question {i}?", f" answer {i}{marker if i < 6 else ''}")
    (warning,) = ends.warnings()
    assert warning.startswith(f'6 of 10 answers end with "{marker.strip()}": ')


@pytest.mark.parametrize("marker", [" ->", "\n\n###\n\n", "===>"])
def test_a_separator_at_the_end_of_most_prompts_is_a_warning(marker: str) -> None:
    ends = EndMarkers()
    ends.add(f"Question?{marker}", "answer")
    assert ends.warnings()[0].startswith(f'1 of 1 prompts end with "{marker.strip()}": ')


@pytest.mark.parametrize(
    "answer",
    ["No.", "SELECT 1;", "</html>", "```\nx\n```", "SPAM", "It is in the USA", "a --", "(3)", '{"a": 1}', "x = y"],
)
def test_honest_ends_are_no_markers(answer: str) -> None:
    ends = EndMarkers()
    for _ in range(4):
        ends.add("Question?", answer if answer != "a --" else "a")
    assert ends.warnings() == []


def read(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> RowReader:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RowReader(folder, DataConfig(**settings), "raw_data")


def test_a_whole_text_is_one_answer_and_with_a_marker_a_prompt_and_an_answer(tmp_path: Path) -> None:
    rows = [{"text": ALPACA}, {"text": ALPACA}]
    (first, _) = read(tmp_path, rows, text_field="text").rows()
    assert first.messages == [{"role": "assistant", "content": ALPACA}]
    (first, _) = read(tmp_path, rows, text_field="text", answer_after="### Response:").rows()
    assert first.messages == [
        {"role": "user", "content": ALPACA.removesuffix("\nA mark.\n")},
        {"role": "assistant", "content": "\nA mark.\n"},
    ]


def test_warnings_are_complete_when_the_rows_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"Parcel {i}? ->", "completion": " refund END"} for i in range(4)]
    reader = read(tmp_path, rows)
    assert len(list(reader.rows())) == 4
    assert [warning.split(":")[0] for warning in reader.warnings] == [
        '4 of 4 prompts end with "->"', '4 of 4 answers end with "END"',
    ]  # fmt: skip
    assert all(f"raw_data: {warning}\n" in capsys.readouterr().out for warning in reader.warnings[:1])


def test_answers_that_become_json_and_keys_that_nothing_reads_are_warned_of(tmp_path: Path) -> None:
    reader = read(tmp_path, [{"question": "Where?", "answer": ["here", "there"]}] * 2)
    list(reader.rows())
    assert reader.warnings[0].startswith("2 answers are lists or objects and are learnt as JSON")
    turns = [{"role": "user", "content": "hi", "id": 1}, {"role": "assistant", "content": "ho", "mood": "calm"}]
    reader = read(tmp_path, [{"messages": turns}])
    list(reader.rows())
    assert reader.warnings == ["keys of turns that nothing reads: id (1 turns), mood (1 turns)"]
