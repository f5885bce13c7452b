"""The watcher of a line's data: one event for each change, none for faults, and nothing written to the source."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
BUCKET = "watched"


class StateStore(dict[str, Any]):
    """As Airflow's store for the state of an asset; `is_down` for as long as its database is."""

    is_down = False

    async def aget(self, key: str, default: Any = None) -> Any:
        self._refuse_if_down()
        return self.get(key, default)

    async def aset(self, key: str, value: Any) -> None:
        self._refuse_if_down()
        self[key] = value

    def _refuse_if_down(self) -> None:
        if self.is_down:
            raise ConnectionError("postgresql://airflow:hunter2@db")


class Watch:
    """A trigger that runs in a loop of this test, by steps: `changes` waits for a few looks."""

    def __init__(self, uri: str, files: list[str], state: StateStore) -> None:
        from qlora_retrain.runtimes.airflow.new_data import NewDataTrigger

        self.state, self.events = state, list[Any]()
        self.trigger = NewDataTrigger(asset="x1.raw_data", uri=uri, files=files, check_seconds=0.02)
        self.trigger.asset_state_store = state
        self.trigger._log = logging.getLogger("watch")  # Airflow's own passes nothing on to pytest
        self.looks, self._list = 0, self.trigger._list
        self.trigger._list = self._counted_list
        self.loop = asyncio.new_event_loop()
        self.task: asyncio.Task[None] | None = None

    def _counted_list(self) -> Any:
        try:
            return self._list()
        finally:
            self.looks += 1

    async def _looked(self, times: int) -> None:
        while self.looks < times:
            await asyncio.sleep(0.005)

    async def _collect(self) -> None:
        async for event in self.trigger.run():
            self.events.append(event.payload)

    def changes(self) -> list[tuple[int, int]]:
        """Return the new events, as the number of files and of bytes."""
        if self.task is None:
            self.task = self.loop.create_task(self._collect())
        before = len(self.events)
        # One may have begun before the change; one sees it, one that it stays, and one comes after the event.
        self.loop.run_until_complete(asyncio.wait_for(self._looked(self.looks + 5), 60))
        assert not self.task.done(), self.task
        return [(event["files"], event["bytes"]) for event in self.events[before:]]

    def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            self.loop.run_until_complete(asyncio.gather(self.task, return_exceptions=True))
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watch]]:
    monkeypatch.setenv("QLORA_RETRAIN_ROOT", (tmp_path / "store").as_uri())
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(tmp_path / "platform.yaml"))
    (tmp_path / "platform.yaml").write_text("{}\n")
    watches: list[Watch] = []

    def start(uri: str, *files: str, state: StateStore | None = None) -> Watch:
        watches.append(Watch(uri, list(files or ("**",)), StateStore() if state is None else state))
        return watches[-1]

    yield start
    for each in watches:
        each.stop()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("1\n")
    return tmp_path / "data"


def test_each_change_of_a_folder_is_one_event(watch: Callable[..., Watch], data: Path) -> None:
    watched = watch(data.as_uri(), "*.jsonl")
    assert watched.changes() == []  # what is there when the line is switched on is not new
    (data / "b.jsonl").write_text("22\n")
    assert watched.changes() == [(2, 5)]
    assert watched.changes() == []
    (data / "notes.txt").write_text("no data")
    assert watched.changes() == []
    (data / "b.jsonl").unlink()
    assert watched.changes() == [(1, 2)]
    assert sorted(path.name for path in data.iterdir()) == ["a.jsonl", "notes.txt"]
    assert set(watched.events[0]) == {"source", "files", "bytes"}  # no name of a file, which could be anything


def test_a_copy_of_many_files_is_one_event(watch: Callable[..., Watch], data: Path) -> None:
    from qlora_retrain.runtimes.airflow import new_data

    watched = watch(data.as_uri())
    watched.trigger.settle_seconds = 0.1
    watched.changes()

    async def copy() -> None:
        for i in range(8):
            (data / f"part-{i}.jsonl").write_text("1\n")
            await asyncio.sleep(0.04)

    watched.loop.run_until_complete(copy())
    assert watched.events == []
    assert watched.changes() == [(9, 18)]
    assert new_data._MAX_SETTLE_LOOKS * new_data._SETTLE_SECONDS <= 3600  # a log that always grows is data, too


def test_another_triggerer_goes_on_where_the_first_ended(watch: Callable[..., Watch], data: Path) -> None:
    first = watch(data.as_uri())
    first.changes()
    (data / "b.jsonl").write_text("22\n")
    assert len(first.changes()) == 1
    second = watch(data.as_uri(), state=first.state)
    assert second.changes() == []  # no flood after a restart
    (data / "c.jsonl").write_text("3\n")  # while none runs
    third = watch(data.as_uri(), state=StateStore(first.state))
    assert third.changes() == [(3, 7)]


def test_faults_are_logged_and_tried_again(
    watch: Callable[..., Watch], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(data.as_uri())
    watched.changes()
    caplog.set_level(logging.WARNING)

    def fault(words: str) -> None:
        caplog.clear()
        assert watched.changes() == []
        assert words in caplog.text

    shutil.move(data, tmp_path / "away")
    fault("does not exist; expected a file or a folder")
    shutil.move(tmp_path / "away", data)
    (data / "a.jsonl").rename(data / ".hidden")
    fault("has no files that match")  # emptied for new files to come
    (data / ".hidden").rename(data / "a.jsonl")
    (data / "to-nothing.jsonl").symlink_to(tmp_path / "nothing")
    fault("a link to nothing")
    (data / "to-nothing.jsonl").unlink()
    (data / "line\nbreak.jsonl").write_text("1\n")
    fault("unprintable")
    (data / "line\nbreak.jsonl").unlink()
    (tmp_path / "platform.yaml").write_text("sources: [file:///elsewhere/]\n")
    fault("not below an allowed source")
    (tmp_path / "platform.yaml").write_text("sources: nonsense\n")
    fault("sources")
    (tmp_path / "platform.yaml").write_text("{}\n")

    watched.state.is_down = True
    (data / "b.jsonl").write_text("22\n")
    fault("ConnectionError in _refuse_if_down")
    assert "hunter2" not in caplog.text
    watched.state.is_down = False
    assert watched.changes() == [(2, 5)]


def test_an_event_whose_memory_failed_is_emitted_again(watch: Callable[..., Watch], data: Path) -> None:
    watched = watch(data.as_uri())
    watched.changes()
    keep = watched.state.aset

    async def fail_once(key: str, value: Any) -> None:
        watched.state.aset = keep  # type: ignore[method-assign]
        raise ConnectionError

    watched.state.aset = fail_once  # type: ignore[method-assign]
    (data / "b.jsonl").write_text("22\n")
    assert watched.changes() == [(2, 5), (2, 5)]


def test_a_bucket_is_watched_and_only_read(
    watch: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.session.Session().client("s3")
    try:
        watched = watch(f"s3://{BUCKET}/tickets", "*.jsonl")
        assert watched.changes() == []
        assert "the data was not looked at, and will be again" in caplog.text  # there is no bucket yet
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="tickets/a.jsonl", Body=b"1\n")
        assert watched.changes() == []
        client.put_object(Bucket=BUCKET, Key="tickets/a.jsonl", Body=b"9\n")
        assert watched.changes() == [(1, 2)]
        client.put_object(Bucket=BUCKET, Key="elsewhere/b.jsonl", Body=b"9\n")
        assert watched.changes() == []
        keys = [item["Key"] for item in client.list_objects_v2(Bucket=BUCKET)["Contents"]]
        assert keys == ["elsewhere/b.jsonl", "tickets/a.jsonl"]
    finally:
        client.close()
        server.stop()
