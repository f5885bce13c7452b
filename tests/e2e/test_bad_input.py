"""Bad input: each kind has its exit code and a message that says what to do, and never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

GOOD = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "refund"}]}\n'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "exit_code", "expected_text"),
    [
        (b"", 12, "no rows"),
        (GOOD.encode() + b'{"messages": [{"role": "us', 10, "tickets.jsonl:2"),
        (GOOD.replace("hi", "café").encode("latin-1"), 12, "UTF-8"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}\n', 10, "tickets.jsonl:1"),
    ],
    ids=["an empty file", "a truncated JSON line", "a Latin-1 file", "a row with no assistant turn"],
)
def test_bad_files_end_the_run_with_a_reason(
    make_project: Callable, content: bytes, exit_code: int, expected_text: str
) -> None:
    project = make_project()
    (project.folder / "tickets.jsonl").write_bytes(content)
    result = project.run()
    assert result.exit_code == exit_code, result.text
    assert expected_text in result.text
    assert "Traceback" not in result.text


def test_a_missing_folder_is_named(make_project: Callable) -> None:
    project = make_project()
    result = project.run("--set", "sources.raw_data=nowhere/at/all")
    assert result.exit_code == 12
    assert result.err.count("\n") == 1
    assert "nowhere/at/all does not exist" in result.err


def test_an_unknown_key_gets_its_near_match(make_project: Callable) -> None:
    result = make_project().run("--set", "train.learning_rat=1e-4")
    assert result.exit_code == 12
    assert "did you mean learning_rate?" in result.err


def test_a_base_model_that_wants_to_run_code_is_refused(make_project: Callable, tiny_model: Path) -> None:
    project = make_project()
    shutil.copytree(tiny_model, project.folder / "model")
    config = json.loads((tiny_model / "config.json").read_text())
    (project.folder / "model/config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    result = project.run("--set", "sources.base_model=model")
    assert result.exit_code == 13
    assert "auto_map" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("where", ["--root", "source"])
def test_a_password_in_a_uri_is_refused_and_not_repeated(make_project: Callable, where: str) -> None:
    project = make_project()
    secret = "s3://user:hunter2@bucket/prefix"
    if where == "--root":
        result = project.cli("plan", project.config, "--root", secret)
    else:
        result = project.cli("plan", project.config, "--root", project.root, "--set", f"sources.raw_data={secret}")
    assert result.exit_code == 12
    assert "credentials come from the environment" in result.err
    assert "hunter2" not in result.text
