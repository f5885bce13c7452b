"""What strangers wrote never commands a terminal, wherever it is printed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_retrain.core import progress, visible_text
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.visible_text import VisibleStream, escape_controls

# A title, a cleared screen, a moved cursor, a carriage return, a C1 sequence, a line that is turned round.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[1A\rdone\x9b31m\u202egnp\x00\x7f"


@given(st.text(st.characters(min_codepoint=0, max_codepoint=0x2070) | st.characters()))
def test_nothing_that_a_terminal_obeys_is_left_and_all_else_is_as_it_was(text: str) -> None:
    visible = escape_controls(text + "\ud800")
    for character in visible:
        assert character in "\t\n" or not (ord(character) < 32 or 127 <= ord(character) < 160)
    visible.encode()
    printable = "".join(c for c in text if c in "\t\n" or c.isprintable())
    assert escape_controls(printable) == printable


def test_a_stream_shows_the_escape_and_a_bar_still_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    visible_text.protect_output()
    visible_text.protect_output()
    assert isinstance(sys.stdout, VisibleStream)
    print(HOSTILE)
    assert terminal.getvalue() == r"\x1b]0;owned\x07\x1b[2J\x1b[1A\rdone\x9b31m\u202egnp\x00\x7f" + "\n"
    progress.update("training", 1, 2)
    assert terminal.getvalue().endswith("\x1b[K")


def test_the_colours_of_a_library_and_carriage_returns_at_line_ends_are_left_out() -> None:
    assert (
        escape_controls("Task \x1b[96m'plan'\x1b[0m: \x1b[1;91mFAILURE\x1b[m\r\nnext") == "Task 'plan': FAILURE\nnext"
    )


def test_the_reason_of_an_ending_holds_none_of_them() -> None:
    ending = Ending.from_problem("validate_data", UsageError(HOSTILE))
    for text in (ending.summary(), ending.sentence(), json.loads(ending.as_json())["reason"]):
        assert r"\x1b]0;owned\x07" in text
        assert not set(text) & set("\x1b\x07\r\x9b\u202e\x00\x7f")


def test_the_command_line_shows_a_file_name_and_an_error_without_them(tmp_path: Path) -> None:
    path = tmp_path / "line\x1b[2J.yaml"
    path.write_text("line: tickets\nunknown: 1\n")
    command = [sys.executable, "-m", "qlora_retrain.cli", "check", str(path)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 12
    assert r"line\x1b[2J.yaml" in completed.stderr
    assert "\x1b" not in completed.stdout + completed.stderr
