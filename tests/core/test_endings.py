"""An ending: what each exit code says by itself, what a document keeps, and what is no ending."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from qlora_retrain.core import endings
from qlora_retrain.core.endings import Ending, Kind
from qlora_retrain.core.errors import Cause, Exit, TryAgain, UsageError
from qlora_retrain.core.signals import StoppedBySignal
from qlora_retrain.core.visible_text import escape_controls


@pytest.mark.parametrize(
    ("code", "kind", "cause", "retry"),
    [
        (0, "done", None, False),
        (1, "error", "bug", False),
        (10, "refused", "data_refused", False),
        (11, "refused", "quality_refused", False),
        (12, "error", "usage", False),
        (13, "error", "integrity", False),
        (14, "error", "diverged", False),
        (75, "retry", "temporary", True),
        (137, "retry", "host_oom", True),
        (-9, "retry", "killed", True),
        (143, "retry", "killed", True),
        (2, "error", "bug", False),
    ],
)
def test_an_exit_code_alone_has_a_kind_and_a_cause(code: int, kind: str, cause: str | None, retry: bool) -> None:
    ending = Ending.from_exit_code("train_qlora", code)
    assert (ending.kind, ending.cause, ending.retry) == (kind, cause, retry)


def test_every_exit_code_of_the_table_has_a_kind() -> None:
    assert {Ending.from_exit_code("x", code).kind for code in Exit} == set(Kind)


def test_a_gpu_out_of_memory_is_an_error_and_the_hosts_is_retried() -> None:
    assert Ending(137, Cause.GPU_OOM, "", "train_qlora").kind == "error"
    assert Ending(137, Cause.HOST_OOM, "", "train_qlora").kind == "retry"


def test_the_document_has_exactly_the_promised_fields_on_one_line() -> None:
    ending = Ending(75, Cause.DISK_FULL, "the disk\nis full", "train_qlora", "ab" * 32, "attempt-1")
    text = ending.as_json()
    assert "\n" not in text
    assert json.loads(text) == {
        "code": 75,
        "kind": "retry",
        "cause": "disk_full",
        "reason": "the disk\nis full",
        "step": "train_qlora",
        "key": "ab" * 32,
        "attempt": "attempt-1",
        "retry": True,
    }
    assert endings.from_json(text) == ending


@pytest.mark.parametrize("limit_bytes", [300, 1000, 4096])
@pytest.mark.parametrize("reason", ["x" * 9000, "é€𝄞" * 3000, '"\\\n' * 3000, "short"])
def test_a_long_reason_is_cut_so_that_the_document_fits_and_can_be_read(reason: str, limit_bytes: int) -> None:
    text = Ending(12, Cause.USAGE, reason, "publish").as_json(limit_bytes=limit_bytes)
    assert len(text.encode()) <= limit_bytes
    ending = endings.from_json(text)
    assert ending is not None
    assert reason.startswith(ending.reason.removesuffix(" ..."))
    assert len(text.encode()) > limit_bytes * 0.6 or reason == "short", "no more is cut than has to be"


def test_the_last_marked_line_of_an_output_counts() -> None:
    first, last = Ending(75, Cause.PREEMPTED, "a", "x"), Ending(0, None, "", "x")
    output = f"text\n{endings.MARK}{first.as_json()}\nmore\n{endings.MARK}{last.as_json()}\n"
    assert endings.from_output(output) == last
    assert endings.from_output(last.as_json()) == last


@pytest.mark.parametrize("reason", ["a\u2028b\x85c", "\x1b[31mred\r\n\x00"])
def test_characters_that_look_like_line_breaks_do_not_cut_the_marked_line(reason: str) -> None:
    ending = Ending(12, Cause.USAGE, reason, "x")
    # What a terminal would obey is in the document as its escape.
    expected = replace(ending, reason=escape_controls(reason))
    assert endings.from_output(f"text\n{endings.MARK}{ending.as_json()}\n") == expected


def test_a_document_holds_no_presigned_url_and_no_password() -> None:
    reason = "403 for https://cdn/x?X-Amz-Signature=abc, s3://me:secret@bucket/x and http://minio:9000/x"
    ending = endings.from_json(Ending(75, Cause.THROTTLED, reason, "x").as_json())
    assert ending is not None
    assert ending.reason == "403 for https://cdn/x?*** s3://***@bucket/x and http://minio:9000/x"


def test_a_file_name_that_is_not_utf_8_can_be_in_a_reason() -> None:
    text = Ending(12, Cause.USAGE, os.fsdecode(b"/data/\xff.jsonl is empty"), "x").as_json(limit_bytes=4096)
    ending = endings.from_json(text.encode())
    assert ending is not None
    assert ending.reason == "/data/\\udcff.jsonl is empty"


@pytest.mark.parametrize(
    "text",
    [
        "",
        endings.MARK + "[" * 100_000,
        endings.MARK + '{"code": 1e999, "cause": null, "reason": "", "step": "x", "key": null, "attempt": null}',
        "validate_data: data refused (10): half of the rows are bad",
        "[]",
        "{}",
        '{"code": 12}',
        '{"code": 12, "cause": "no such cause", "reason": "", "step": "x", "key": null, "attempt": null}',
        f"a line that only mentions {endings.MARK}" + "{}",
    ],
)
def test_what_is_no_document_is_no_ending(text: str) -> None:
    assert endings.from_output(text) is None


def test_a_problem_gives_its_code_its_cause_and_its_text() -> None:
    assert Ending.from_problem("x", UsageError("no such file")) == Ending(12, Cause.USAGE, "no such file", "x")
    assert Ending.from_problem("x", TryAgain("busy", cause=Cause.THROTTLED)).cause == "throttled"
    assert Ending.from_problem("x", StoppedBySignal("stopped by SIGTERM")).cause == "preempted"


def test_the_sentence_names_the_step_the_meaning_the_code_and_the_reason() -> None:
    ending = Ending.from_exit_code("validate_data", 10, "half of the rows are bad")
    assert ending.sentence() == "validate_data: data refused (10): half of the rows are bad"
    assert Ending.from_exit_code("x", -9).summary() == "ended by signal 9 (-9)"


def test_a_message_that_quotes_a_text_of_any_length_is_cut() -> None:
    assert str(UsageError("x" * 30_000)) == "x" * 20_000 + "… (10,000 more)"
    assert str(UsageError("x" * 20_000)) == "x" * 20_000
