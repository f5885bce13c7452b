"""A task's log has every text of a step, and of its progress a line every half minute."""

from __future__ import annotations

import json
import logging

import pytest

from qlora_retrain.core import endings
from qlora_retrain.core.endings import Ending
from qlora_retrain.runtimes.airflow.step_log import StepLog, copy_output


def report(seconds: float, done: float, total: float = 1000, work: str = "training", **numbers: float) -> str:
    return json.dumps({"time": 1_000_000 + seconds, "what": work, "done": done, "total": total, **numbers})


def visible(lines: list[str]) -> list[str]:
    step_log = StepLog()
    return [text for line in lines if (text := step_log.visible_text(line)) is not None]


def test_of_a_thousand_reports_the_first_the_last_and_one_every_half_minute_are_shown() -> None:
    lines = visible([report(i / 10, i) for i in range(1, 1001)])
    assert lines == [
        "training: 1 of 1000 (0 %)",
        "training: 301 of 1000 (30 %)",
        "training: 601 of 1000 (60 %)",
        "training: 901 of 1000 (90 %)",
        "training: 1000 of 1000 (100 %)",
    ]


def test_each_kind_of_work_has_its_own_pace_and_its_numbers() -> None:
    lines = visible([report(0, 10, loss=0.4123), report(1, 0, 8, "eval loss"), report(2, 8, 8, "eval loss")])
    assert lines == [
        "training: 10 of 1000 (1 %)  loss 0.4123",
        "eval loss: 0 of 8 (0 %)",
        "eval loss: 8 of 8 (100 %)",
    ]
    # Work that is done again and again: its ends too come at most every half minute.
    again = visible([report(seconds, done, 8, "eval loss") for seconds in range(0, 60, 2) for done in (4, 8)])
    assert len(again) == 4


def test_every_text_is_shown_and_a_bar_as_it_was_last_drawn() -> None:
    bars = [f"Loading weights: {i:3}%|{'#' * 9}| {i}/100 [00:01<00:01, 40.2it/s]" for i in range(101)]
    assert visible(["a", *bars, "b", "", '{"time": 1}', "100% of the rows"]) == [
        "a", bars[0], bars[-1], "b", "", '{"time": 1}', "100% of the rows"
    ]  # fmt: skip
    assert visible(["\r".join(bars)]) == [bars[-1]]
    assert visible(["text\r"]) == ["text"]


@pytest.mark.parametrize(
    "line",
    [
        '{"time": "x", "what": "w", "done": 1, "total": 0}',
        '{"time": 1e999, "what": "w", "done": 1, "total": 2}',
        '{"time": true, "what": "' + "x" * 1000 + '", "done": 1e17, "total": 2}',
        "%|" * 20_000,
        "1%|" + "x" * 60_000,
        "\r" * 60_000,
    ],
)
def test_what_a_strange_program_prints_breaks_nothing(line: str) -> None:
    assert len(visible([line])) == 1


def test_the_last_line_comes_first_and_neither_progress_nor_the_ending_is_among_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ending = Ending.from_exit_code("evaluate", 11, "worse")
    lines = ["one\n", "two\n", "three\n", "four\n", report(1, 2) + "\n", "\n", endings.MARK + ending.as_json() + "\n"]
    with caplog.at_level(logging.INFO):
        output = copy_output(lines, logging.getLogger("task"))
    assert output.ending == ending
    assert output.last_lines == "four\nbefore that: three\nbefore that: two"
    assert [record.message for record in caplog.records] == [
        "one", "two", "three", "four", "training: 2 of 1000 (0 %)", ""
    ]  # fmt: skip
