"""The judge calls right what was encoded right by hand, and names the rule that a wrong encoding breaks."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.lm.families.alignment import align
from tests.lm.families.family import Family
from tests.lm.families.imitations import BY_NAME
from tests.lm.families.judge import Verdict, judge
from tests.lm.families.row_reading import Reading
from tests.lm.families.rows import KINDS, Row, answer, rows_of_kind, user
from tests.lm.families.tokenizers import write_folder

DAY = "2026-11-20"


@dataclass
class Example:
    """What a module would return."""

    input_ids: list[int]
    supervised: list[bool]
    warnings: tuple[str, ...] = ()


class Refusal(Exception):
    """A row that a module would refuse."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judged")


def load(folders: Path, name: str) -> tuple[Family, Any]:
    folder = folders / name
    if not folder.exists():
        write_folder(BY_NAME[name], folder)
    return BY_NAME[name], AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encoded(tokenizer: Any, marked: str, *warnings: str) -> Example:
    """Encode a text in which the supervised parts stand between « and »."""
    ids: list[int] = []
    supervised: list[bool] = []
    for i, part in enumerate(re.split("[«»]", marked)):
        part_ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += part_ids
        supervised += [i % 2 == 1] * len(part_ids)
    return Example(ids, supervised, warnings)


def verdict(folders: Path, name: str, row: Row, *examples: str, warnings: tuple[str, ...] = ()) -> Verdict:
    family, tokenizer = load(folders, name)
    reading = Reading(family, row, tokenizer, DAY)
    return judge(reading, [[encoded(tokenizer, text, *warnings) for text in examples]])


SHORT = Row(2, "short", [user("why?"), answer("no.")])
LONG = Row(3, "long", [user("why?"), answer("no."), user("when?"), answer("soon.")])
QWEN = "<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n"
REPLY = "<|im_start|>assistant\n"
FURTHER = f"{QWEN}{REPLY}«no.<|im_end|>»\n<|im_start|>user\nwhen?<|im_end|>\n{REPLY}«soon.<|im_end|>»"


@pytest.mark.parametrize("tail", ["", "\n"], ids=["cut", "whole"])
def test_an_answer_with_its_end_is_right(folders: Path, tail: str) -> None:
    assert verdict(folders, "qwen2.5", SHORT, f"{QWEN}{REPLY}«no.<|im_end|>»{tail}") == Verdict("right")


def test_every_answer_of_a_longer_chat_may_be_in_one_example_or_in_its_own(folders: Path) -> None:
    first = f"{QWEN}{REPLY}«no.<|im_end|>»"
    second = FURTHER.replace("«no.<|im_end|>»", "no.<|im_end|>")
    assert verdict(folders, "qwen2.5", LONG, FURTHER) == Verdict("right")
    assert verdict(folders, "qwen2.5", LONG, first, second) == Verdict("right")


WRONG = {
    "(a) other tokens": f"{QWEN.replace('Qwen', 'Bert')}{REPLY}«no.<|im_end|>»",
    "(b) turn 1 is not supervised from its start: b'.<": f"{QWEN}{REPLY}no«.<|im_end|>»",
    "(b) turn 1 is not supervised from its start: b'assistant": f"{QWEN}<|im_start|>«assistant\nno.<|im_end|>»",
    "(b) supervised is no answer with its end: b'no.'": f"{QWEN}{REPLY}«no.»<|im_end|>",
    "(b) supervised is no answer with its end: b'no.<|im_end|>\\n'": f"{QWEN}{REPLY}«no.<|im_end|>\n»",
    "(b) supervised is no answer with its end: b'why?": QWEN.replace("why?<|im_end|>", "«why?<|im_end|>»")
    + f"{REPLY}«no.<|im_end|>»",
    "(b) no mask of this length, or nothing supervised": f"{QWEN}{REPLY}no.<|im_end|>",
}


@pytest.mark.parametrize(("fault", "text"), WRONG.items())
def test_a_wrong_mask_or_another_text_is_wrong(folders: Path, fault: str, text: str) -> None:
    outcome = verdict(folders, "qwen2.5", SHORT, text)
    assert outcome.outcome == "wrong"
    assert outcome.detail.startswith(fault)


def test_an_answer_that_is_learnt_twice_or_never_is_wrong(folders: Path) -> None:
    first = f"{QWEN}{REPLY}«no.<|im_end|>»"
    assert verdict(folders, "qwen2.5", LONG, FURTHER, first) == Verdict(
        "wrong", "(d) supervised twice: turns [1, 3, 1]"
    )
    assert verdict(folders, "qwen2.5", LONG, first) == Verdict("wrong", "(b) supervised are turns [1] of [1, 3]")
    weighted = Row(14, "weight", [LONG.messages[0], {**LONG.messages[1], "weight": 0}, *LONG.messages[2:]])
    assert verdict(folders, "qwen2.5", weighted, FURTHER) == Verdict("wrong", "(b) supervised are turns [1, 3] of [3]")


def test_an_answer_must_end_where_servers_stop(folders: Path) -> None:
    start = "<|start|>system<|message|>You are a model of words.\nCurrent date: 2026-11-20<|end|>"
    first = f"{start}<|start|>user<|message|>why?<|end|><|start|>assistant«<|channel|>final<|message|>no."
    second = "<|start|>user<|message|>when?<|end|><|start|>assistant«<|channel|>final<|message|>soon.<|return|>»"
    whole = f"{first}<|end|>»{second}"
    assert verdict(folders, "gpt-oss", LONG, whole).detail.startswith("(c) the last supervised token of turn 1")
    alone = f"{first}<|end|>{second}".replace("«", "", 1)
    assert verdict(folders, "gpt-oss", LONG, f"{first}<|return|>»", alone) == Verdict("right")


def test_an_answer_must_stand_behind_what_the_model_reads_at_inference(folders: Path) -> None:
    """Qwen 3 writes an empty block of thoughts before the last answer alone."""
    block = "<think>\n\n</think>\n\n"
    first, second = "<|im_start|>user\nwhy?<|im_end|>\n", "\n<|im_start|>user\nwhen?<|im_end|>\n"
    whole = f"{first}{REPLY}«no.<|im_end|>»{second}{REPLY}{block}«soon.<|im_end|>»"
    assert verdict(folders, "qwen3", LONG, whole).detail.startswith("(d) turn 1 stands behind another text")
    alone = f"{first}{REPLY}no.<|im_end|>{second}{REPLY}«{block}soon.<|im_end|>»"
    assert verdict(folders, "qwen3", LONG, f"{first}{REPLY}«{block}no.<|im_end|>»", alone) == Verdict("right")


def test_an_end_that_the_template_does_not_write_may_be_appended_with_a_word(folders: Path) -> None:
    text = "[gMASK]<sop><|user|>\nwhy?<|assistant|>«\nno.{}»"
    assert verdict(folders, "glm-4", SHORT, text.format("<|user|>"), warnings=("end_appended",)) == Verdict("right")
    assert verdict(folders, "glm-4", SHORT, text.format("<|endoftext|>"), warnings=("end_appended",)) == Verdict(
        "right"
    )
    assert verdict(folders, "glm-4", SHORT, text.format("<|user|>")).detail.startswith("(e) an end was appended")
    assert verdict(folders, "glm-4", SHORT, text.format("")).outcome == "wrong"


def test_white_space_that_the_template_trims_needs_a_word(folders: Path) -> None:
    row = Row(4, "spaces", [user("why?"), answer("  no.  ")])
    text = "<bos><start_of_turn>user\nwhy?<end_of_turn>\n<start_of_turn>model\n«no.<end_of_turn>»"
    assert verdict(folders, "gemma-3", row, text).detail.startswith("(e) white space at the ends is gone")
    assert verdict(folders, "gemma-3", row, text, warnings=("trimmed_ends",)) == Verdict("right")
    assert verdict(folders, "gemma-3", SHORT, text, warnings=("trimmed_ends",)).outcome == "wrong"


ENCODED_ALTHOUGH = {
    ("mistral-7b-v0.3", 1): "template_drops_text",
    ("gemma-2", 1): "template_refuses",
    ("ernie-4.5", 2): "answer_end_is_no_stop",
    ("nemotron-nano-v2", 2): "answer_inside_reasoning",
    ("one-line", 4): "template_rewrites_text",
    ("deepseek-r1", 11): "tools_unsupported",
    ("falcon-180b-chat", 12): "mark_in_text",
}


@pytest.mark.parametrize(("name", "kind"), ENCODED_ALTHOUGH)
def test_a_row_that_cannot_be_right_must_be_refused_for_that_reason(folders: Path, name: str, kind: int) -> None:
    family, tokenizer = load(folders, name)
    reason = ENCODED_ALTHOUGH[name, kind]
    readings = [Reading(family, row, tokenizer, DAY) for row in rows_of_kind(kind, family)]
    reading = next(reading for reading in readings if reading.must)
    assert judge(reading, [[Example([1], [True])]]).detail.startswith("encoded although")
    assert judge(reading, [Refusal(reason)]) == Verdict("refused_true", reason)
    assert judge(reading, [Refusal("no_supervised_tokens")]).outcome == "untrue"


def test_a_refusal_of_a_good_row_is_untrue_and_another_exception_a_crash(folders: Path) -> None:
    family, tokenizer = load(folders, "qwen2.5")
    reading = Reading(family, SHORT, tokenizer, DAY)
    assert judge(reading, [Refusal("template_drops_text")]).outcome == "untrue"
    assert judge(reading, [KeyError("role")]).outcome == "crash"


def test_another_day_must_change_nothing(folders: Path) -> None:
    family, tokenizer = load(folders, "llama-3.2")
    reading = Reading(family, SHORT, tokenizer, DAY)
    text = reading.whole.text
    assert text is not None
    assert "20 Nov 2026" in text
    marked = text.replace("no.<|eot_id|>", "«no.<|eot_id|>»")
    today, tomorrow = encoded(tokenizer, marked), encoded(tokenizer, marked.replace("20 Nov", "21 Nov"))
    assert judge(reading, [[today], [today]]) == Verdict("right")
    assert judge(reading, [[today], [tomorrow]]).detail.startswith("(a) other tokens")
    assert judge(reading, [[today], [Example(today.input_ids[:-1], today.supervised[:-1])]]).outcome == "wrong"


@pytest.mark.parametrize(
    "name", ["llama-2", "zephyr", "yi-chat", "falcon-180b-chat", "llama-4", "phi-4", "solar", "alpaca"]
)
def test_tokens_are_laid_along_any_text(folders: Path, name: str) -> None:
    """Every kind of tokenizer, over every row: what the tokens spell is the text, up to what marks swallow."""
    family, tokenizer = load(folders, name)
    for kind in KINDS:
        for row in rows_of_kind(kind, family):
            text = Reading(family, row, tokenizer, DAY).whole.text
            if text is None:
                continue
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            alignment = align(tokenizer, ids, text)
            assert alignment is not None, row.variant
            covered = sorted([*alignment.spans, *alignment.swallowed])
            assert covered[-1][1] == len(text.encode())
            assert all(a[1] == b[0] for a, b in itertools.pairwise(covered)), row.variant
            assert align(tokenizer, ids, f"x{text}") is None
