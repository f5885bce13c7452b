"""`preview` shows rows as the model sees them, and `check --data` says what the data gate would."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components import data_preview

Look = Callable[..., tuple[int, str, str]]


@pytest.fixture
def look(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Look:
    """Run the program on rows, with settings of `data`; return its exit code and what it printed."""

    def run(rows: list[Any], *arguments: str, **settings: Any) -> tuple[int, str, str]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        document = {
            "line": "tickets",
            "sources": {"raw_data": path.as_uri(), "base_model": tiny_model.as_uri()},
            "data": settings,
        }
        monkeypatch.setattr(sys, "argv", ["preview", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(document)))
        code = data_preview.main()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def chat(number: int, answer: str = "refund") -> dict[str, Any]:
    turns = [("system", "Be  brief."), ("user", f"order {number}:\n\tmoney back?"), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_a_row_is_shown_with_what_is_learnt_marked_and_its_white_space_visible(look: Look) -> None:
    code, out, _ = look([chat(1), chat(2), chat(3)], "--rows", "2")
    assert code == 0
    assert "Be\u00b7\u00b7brief.<|im_end|>\u21b5\n" in out
    assert "order\u00b71:\u21b5\n\u2192\tmoney\u00b7back?" in out
    assert out.count("[[refund<|im_end|>]]") == 2
    assert "generation stops at: <|im_end|>" in out
    assert "rows.jsonl:1:" in out
    assert "order\u00b73" not in out


def test_what_a_terminal_would_hide_or_obey_is_shown_as_its_escape(look: Look) -> None:
    hidden = "a\u2028b\u200bc\x1b[31md\u00a0e"
    _, out, _ = look([chat(1, hidden)])
    assert "a\\u2028b\\u200bc\\x1b[31md\u237de" in out
    assert not set(hidden) & set("\u2028\u200b\x1b\u00a0") & set(out)


def test_a_row_that_is_left_out_is_named_with_its_reason(look: Look) -> None:
    _, out, _ = look([chat(1), chat(2, "yes<|im_end|>no"), {"messages": 7}])
    assert "2 of the first 3 rows are left out:" in out
    assert "mark_in_text: 1, first rows.jsonl:2" in out


def test_what_the_line_says_of_the_data_is_what_is_shown(look: Look) -> None:
    row = {"question": "money?", "context": "order 7", "answer": "refund"}
    settings = {"prompt_template": "{question}\n{context}", "response_field": "answer", "template": "alpaca"}
    _, out, _ = look([row], **settings)
    assert "###\u00b7Instruction:\u21b5\nmoney?\u21b5\norder\u00b77\u21b5" in out
    assert "chat template: alpaca" in out


def test_check_says_what_the_gate_would_and_ends_with_its_code(look: Look) -> None:
    code, out, _ = look([chat(n) for n in range(200)], "--check")
    assert (code, "accepted: rows_read 200" in out) == (0, True)
    code, _, error = look([chat(1)] * 3, "--check")
    assert code == 10
    assert "data refused" in error


def test_the_verb_runs_the_program_on_a_line(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat(1)) + "\n")
    line = tmp_path / "line.yaml"
    line.write_text(f"line: tickets\nsources: {{raw_data: rows.jsonl, base_model: {tiny_model}}}\n")
    command = [sys.executable, "-m", "qlora_retrain.cli", "preview", str(line), "--rows", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "[[refund<|im_end|>]]" in done.stdout) == (0, True), done.stderr
