"""Bad input, each with its exit code and a line that says what to do; never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

GOOD = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "refund"}]}\n'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", 12, "no rows"),
        (GOOD.encode() + b'{"messages": [{"role": "us', 12, "tickets.jsonl:2"),
        (GOOD.replace("hi", "café").encode("latin-1"), 12, "UTF-8"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}\n', 10, "tickets.jsonl:1"),
    ],
    ids=["an empty file", "a truncated JSON line", "a Latin-1 file", "a row with no assistant turn"],
)
def test_bad_files_end_the_run_with_a_reason(make_project: Callable, content: bytes, code: int, says: str) -> None:
    project = make_project()
    (project.folder / "tickets.jsonl").write_bytes(content)
    ended = project.run()
    assert ended.code == code, ended.text
    assert says in ended.text
    assert "Traceback" not in ended.text


def test_a_missing_folder_is_named(make_project: Callable) -> None:
    project = make_project()
    ended = project.run("--set", "sources.raw_data=nowhere/at/all")
    assert ended.code == 12
    assert ended.err.count("\n") == 1
    assert "nowhere/at/all does not exist" in ended.err


def test_an_unknown_key_gets_its_near_match(make_project: Callable) -> None:
    ended = make_project().run("--set", "train.learning_rat=1e-4")
    assert ended.code == 12
    assert "did you mean learning_rate?" in ended.err


def test_a_base_model_that_wants_to_run_code_is_refused(make_project: Callable, tiny_model: Path) -> None:
    project = make_project()
    shutil.copytree(tiny_model, project.folder / "model")
    config = json.loads((tiny_model / "config.json").read_text())
    (project.folder / "model/config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    ended = project.run("--set", "sources.base_model=model")
    assert ended.code == 13
    assert "auto_map" in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("where", ["--root", "source"])
def test_a_password_in_a_uri_is_refused_and_not_repeated(make_project: Callable, where: str) -> None:
    project = make_project()
    secret = "s3://user:hunter2@bucket/prefix"
    if where == "--root":
        ended = project.cli("plan", project.config, "--root", secret)
    else:
        ended = project.cli("plan", project.config, "--root", project.root, "--set", f"sources.raw_data={secret}")
    assert ended.code == 12
    assert "credentials come from the environment" in ended.err
    assert "hunter2" not in ended.text
