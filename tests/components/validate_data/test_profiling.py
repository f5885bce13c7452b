"""What was noticed is in the profile and on the page: layouts, unread columns, warnings, and how chats are written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from components.validate_data.checks import Row
from components.validate_data.gate_rows import GateRows, SourceRows
from components.validate_data.profiling import build_profile
from components.validate_data.report import ROW_WARNINGS, report_page
from qlora_retrain.config.data import DataConfig
from qlora_retrain.evaluation import stats
from qlora_retrain.lm.chat import ChatTokenizer
from qlora_retrain.lm.chat_format import ChatFormat

TOKENIZER = cast(ChatTokenizer, SimpleNamespace(stop_texts=["<eos>", "<end_of_turn>"], notes=["the template is odd"]))
TURNS = [{"role": "user", "content": "zebra"}, {"role": "assistant", "content": "refund"}]


def row(number: int, split: Any = "train", **fields: Any) -> Row:
    return Row("a.jsonl", number, TURNS, "0" * 12, tokens=10, supervised_tokens=2, split=split, **fields)


def profile_of(rows: list[Row], config: DataConfig, source: SourceRows | None = None) -> dict[str, Any]:
    gate_rows = GateRows({"raw_data": source or SourceRows(rows)}, rows, 0.1, ("0123456789abcdef",), [])
    chat_format = ChatFormat(template="{{ secret }}", template_kwargs={"enable_thinking": False}, date="2026-01-31")
    return build_profile(gate_rows, config, [], chat_format, TOKENIZER)


def test_layouts_unread_columns_and_warnings_are_named_with_their_source() -> None:
    source = SourceRows([], {"a.jsonl": 'chats in "messages"'}, {"schema": 7}, ["half of the answers end with ###"])
    profile = profile_of([row(1)], DataConfig(), source)
    assert profile["layouts"] == {"raw_data: a.jsonl": 'chats in "messages"'}
    assert profile["unread_columns"] == {"raw_data: schema": 7}
    assert profile["warnings"] == ["raw_data: half of the answers end with ###"]
    page = report_page(profile, "accepted")
    for text in ("chats in &quot;messages&quot;", "raw_data: schema", "half of the answers end with ###"):
        assert text in page


def test_warnings_of_rows_are_counted_with_their_first_row() -> None:
    rows = [row(1), row(2, warnings=("trimmed_ends",)), row(3, "eval", warnings=("end_appended", "trimmed_ends"))]
    # Neither a row that was kept out nor a dropped one says anything about the data that is used.
    rows += [row(4, None, reason="too_long", warnings=("end_appended",)), row(5, "dropped", warnings=("end_appended",))]
    profile = profile_of(rows, DataConfig())
    assert profile["row_warnings"] == {
        "trimmed_ends": {"rows": 2, "first_rows": ["a.jsonl:2", "a.jsonl:3"]},
        "end_appended": {"rows": 1, "first_rows": ["a.jsonl:3"]},
    }
    page = report_page(profile, "accepted")
    assert ROW_WARNINGS["trimmed_ends"] in page
    assert ROW_WARNINGS["end_appended"] in page


def test_how_chats_are_written_is_stated_without_the_text_of_a_template() -> None:
    profile = profile_of([row(1)], DataConfig())
    assert profile["chat"] == {
        "template": "a Jinja file of the line",
        "template_kwargs": {"enable_thinking": False},
        "template_date": "2026-01-31",
        "answer_start": "generation_prompt",
        "generation_stops_at": ["<eos>", "<end_of_turn>"],
        "notes": ["the template is odd"],
    }
    page = report_page(profile, "accepted")
    assert "secret" not in page
    assert "&lt;eos&gt;; &lt;end_of_turn&gt;" in page


def test_too_long_rows_have_their_settings_on_the_page() -> None:
    rows = [row(i) for i in range(30)] + [row(31, None, reason="too_long")]
    rows[-1].tokens = 5000
    profile = profile_of(rows, DataConfig())
    assert profile["too_long"] == {"limit": 1024, "keeps_95_percent": 10, "longest": 5000}
    assert "data.max_length_tokens: 5000 keeps all" in report_page(profile, "accepted")
    assert profile_of(rows[:-1], DataConfig())["too_long"] is None


@pytest.mark.parametrize("num_eval", [30, 135])
def test_the_page_says_what_so_many_evaluation_rows_can_prove_of_labels(num_eval: int) -> None:
    # Two rows of each prompt tell no more than one where all are answered alike.
    rows = [row(i, "eval", prompt_id=f"{i // 2}") for i in range(2 * num_eval)]
    loss = stats.smallest_excludable_loss(num_eval, 0.95)
    sentence = f"rows of {num_eval} different prompts can rule out no loss of accuracy below {loss:.3f} against a "
    assert sentence in report_page(profile_of(rows, DataConfig(task="labels")), "accepted")
    assert "rule out" not in report_page(profile_of(rows, DataConfig()), "accepted")
