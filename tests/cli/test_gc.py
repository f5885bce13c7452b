"""The verb gc: it lists what is garbage, and removes it where that is asked for."""

from __future__ import annotations

import json
import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qlora_retrain.cli import main
from qlora_retrain.storage import open_store, unfinished_uploads
from qlora_retrain.storage.collection_mark import read_mark
from tests.storage.collectable import files_of, write_artifact
from tests.storage.small_versions import in_child


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main.main([str(a) for a in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_dry_run_lists_and_delete_removes(root_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(root_uri)
    write_artifact(store, "dataset", "b" * 64)
    assert run("gc", "--root", root_uri) == 0
    assert capsys.readouterr().out == "garbage: nothing\n"
    write_artifact(store, "dataset", "a" * 64)
    month_ago = (datetime.now(UTC) - timedelta(days=31)).timestamp()
    for path in (Path(root_uri.removeprefix("file://")) / "artifacts" / "dataset" / ("a" * 64)).rglob("*"):
        os.utime(path, (month_ago, month_ago))

    files = files_of(store)
    assert run("gc", "--root", root_uri) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"would remove artifacts/dataset/{'a' * 64}  0.0 MiB: no plan that counts")
    assert printed.endswith("garbage: 1 artifact; 0.0 MiB\nremove it with: --delete\n")
    assert files_of(store) == files

    assert run("gc", "--root", root_uri, "--delete", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["deleted"], [item["kind"] for item in document["items"]]) == (True, ["artifact"])
    assert document["size_bytes"] == sum(item["size_bytes"] for item in document["items"]) > 0
    assert {path.split("/")[2] for path in files_of(store)} == {"b" * 64}


def test_a_timer_that_is_stopped_takes_its_mark_away(root_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_artifact(open_store(root_uri), "dataset", "a" * 64)
    monkeypatch.setattr(unfinished_uploads, "find", lambda store: signal.raise_signal(signal.SIGTERM))

    def collect() -> None:
        assert run("gc", "--root", root_uri, "--delete") == 128 + signal.SIGINT

    assert in_child(collect) == 0
    mark, _ = read_mark(open_store(root_uri))
    assert mark is not None
    assert mark.collection == ""


@pytest.mark.parametrize("days", ["29", "many", "-1", "99999999999"])
def test_runs_are_kept_for_as_long_as_their_plans_count(
    root_uri: str, days: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("gc", "--root", root_uri, "--run-days", days) == 12
    assert "30 at least" in capsys.readouterr().err


def test_a_misspelled_root_is_no_store_without_garbage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "sotre"
    assert run("gc", "--root", root.as_uri(), "--delete") == 12
    assert "expected the root of a store, found nothing there" in capsys.readouterr().err
    assert not root.exists()
    # The disk that it is on has folders of its own, which no user of the store may read.
    (root / "lost+found").mkdir(parents=True)
    (root / "lost+found" / "a").touch()
    assert run("gc", "--root", root.as_uri()) == 12
