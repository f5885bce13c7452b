"""`history` and `keys` as a person calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.cli.main import main
from qlora_retrain.pipeline import make_plan
from qlora_retrain.pipeline.plan import Plan

RunAll = Callable[[Plan], dict[str, int]]


@pytest.fixture
def root(line: Path, root_uri: str, run_all: RunAll) -> str:
    """A store with keys, in which a line has published a version."""
    assert set(run_all(make_plan.make_plan(line, root_uri)).values()) == {0}
    return root_uri


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_history_prints_every_move_and_refuses_a_trail_that_was_changed(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert call("history", "intents", "--root", root) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert [line.split()[1:3] for line in lines] == [["latest", "1:"], ["production", "1:"]]
    assert all("os:" in line and "run 2" in line for line in lines)

    (entry,) = Path(root.removeprefix("file://")).glob("models/intents/audit/*-production-*")
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "reason": "a better one"}))
    assert call("history", "intents", "--root", root) == 13
    assert "the audit trail was changed:" in capsys.readouterr().err


def test_keys_are_shown_handed_out_and_replaced(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert call("keys", "show", "--root", root) == 0
    listing = capsys.readouterr().out
    assert listing.count("  here") == 7
    assert call("keys", "show", "--pem", "publish-intents", "--root", root) == 0
    (tmp_path / "key.pem").write_text(capsys.readouterr().out)

    pull = ["pull", "intents@production", str(tmp_path / "model"), "--root", root]
    assert call(*pull, "--verify-key", str(tmp_path / "key.pem")) == 0
    assert "signed by " in capsys.readouterr().err
    assert call("keys", "export", "evaluate", "--to", str(tmp_path / "exported"), "--root", root) == 0
    assert call("keys", "rotate", "nobody", "--root", root) == 12
    assert call("keys", "rotate", "publish-intents", "--root", root) == 0
    assert call("keys", "create", "--line", "another", "--root", root) == 0
    assert "publish-another" in capsys.readouterr().out
