"""What people had in their way when they pulled: file systems, limits of a process, other users, other tools."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.storage import export, open_store, pull, pulled_folder
from qlora_retrain.storage.atomic_files import disk_errors
from qlora_retrain.storage.local import LocalStore
from qlora_retrain.storage.store import Store
from tests.storage import small_versions
from tests.storage.small_versions import EXPORT, LINE, REFERENCE, files_of, in_child, publish, pulled_files

NOBODY, GROUP = 65534, 54321


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def store(open_folder: Path) -> Store:
    return open_store((open_folder / "store").as_uri())


def as_user(user: int, function: Callable[[], object], umask: int = 0o022) -> int:
    def run() -> None:
        os.setgroups([])
        os.setresgid(GROUP, GROUP, GROUP)
        os.setresuid(user, user, user)
        os.umask(umask)
        function()

    return in_child(run)


def test_a_file_system_says_what_it_has_room_for(store: Store, tmp_path: Path) -> None:
    publish(store, 1)
    program = "\n".join(
        [
            "from pathlib import Path",
            "from qlora_retrain.core.errors import TryAgain",
            "from qlora_retrain.storage import open_store, pull",
            "from tests.storage.small_versions import *",
            f"store, parent = open_store({store.uri!r}), Path({str(tmp_path)!r})",
            # Without a limit it says that it has 0 bytes, of which 0 are free.
            "pull.pull(store, REFERENCE, parent / 'unlimited/model')",
            "assert pulled_files(parent / 'unlimited/model') == files_of(1)",
            "try:",
            "    pull.pull(store, REFERENCE, parent / 'few/model')",
            "except TryAgain as error:",
            "    print(error)",
        ]
    )
    mounts = " && ".join(
        f"mkdir {tmp_path}/{name} && mount -t tmpfs -o {option} none {tmp_path}/{name}"
        for name, option in (("unlimited", "size=0"), ("few", "nr_inodes=8"))
    )
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'{mounts} && echo mounted && exec "$@"',
        "sh",
        sys.executable,
        "-c",
        program,
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    if "mounted" not in ended.stdout:
        pytest.skip(f"nothing can be mounted here: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    assert "can hold no more files" in ended.stdout
    assert "`df -i`" in ended.stdout


@pytest.mark.parametrize(
    ("limit", "number", "remedy"),
    [(resource.RLIMIT_FSIZE, 100, r"`ulimit -f`"), (resource.RLIMIT_NOFILE, 1, r"`ulimit -n`")],
)
def test_a_limit_of_the_process_is_named_with_the_command_that_raises_it(
    store: Store, tmp_path: Path, limit: int, number: int, remedy: str
) -> None:
    publish(store, 1)

    def pull_under_a_limit() -> None:
        # Of files those that are open already count too; the next one has the lowest number that is free.
        lowest = os.dup(0) if limit == resource.RLIMIT_NOFILE else 0
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (lowest + number, hard))
        try:
            with pytest.raises(UsageError, match=remedy):
                pull.pull(store, REFERENCE, tmp_path / "model")
        finally:
            # Or what is printed of a failure would reach the limit too.
            resource.setrlimit(limit, (hard, hard))

    assert in_child(pull_under_a_limit) == 0


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc")
def test_a_disk_that_cannot_be_read_means_try_again() -> None:
    # The first page of a process is never mapped, so a real system call answers EIO.
    with pytest.raises(TryAgain, match="look at the disk"):
        open_store("file:///proc/self").read("mem")


def test_a_file_system_without_links_or_locks_is_named_as_such(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1)

    def as_fat_does(path: Path, target: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "symlink_to", as_fat_does)
    with pytest.raises(UsageError, match="lacks the links or the locks"):
        pull.pull(store, REFERENCE, tmp_path / "model")
    with pytest.raises(UsageError, match="lacks the links or the locks"), disk_errors(tmp_path):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), "lock")


def test_a_working_folder_that_was_removed_is_no_destination(store: Store, tmp_path: Path) -> None:
    publish(store, 1)
    (tmp_path / "gone").mkdir()

    def pull_there() -> None:
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(UsageError, match="choose another destination"):
            pull.pull(store, REFERENCE, Path("model"))

    assert in_child(pull_there) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_two_users_of_a_group_pull_into_one_folder(store: Store, open_folder: Path) -> None:
    destination = open_folder / "shared"
    destination.mkdir()
    os.chown(destination, 0, GROUP)
    destination.chmod(0o2775)
    for number in (1, 2):
        publish(store, number)
        assert as_user(NOBODY - number, lambda: pull.pull(store, REFERENCE, destination), umask=0o002) == 0
        assert pulled_files(destination) == files_of(number)


@pytest.mark.skipif(os.geteuid() != 0, reason="root reads and removes all")
def test_a_version_that_was_protected_from_changes_is_removed_by_the_next_pull(store: Store, open_folder: Path) -> None:
    destination = open_folder / "model"
    destination.mkdir()
    os.chown(destination, NOBODY, GROUP)

    def pull_and_protect() -> None:
        pull.pull(store, REFERENCE, destination)
        for folder in [p for p in (destination / "current").resolve().rglob("*") if p.is_dir()]:
            folder.chmod(0o555)

    for number in (1, 2):
        publish(store, number)
        assert as_user(NOBODY, pull_and_protect) == 0
    assert len([path for path in (destination / ".pulled").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"line": "intents", "version": "x", "seen": []}',
        '{"line": "intents", "version": "x", "seen": {"intents@production": 5}}',
        '{"line": "intents", "version": "x", "seen": {"intents@production": ["a", "b"]}}',
        '{"line": "intents", "version": "x", "seen": {}, "signers": 3}',
        '{"line": "intents", "version": "x", "seen": {}, "manifests": null}',
        '{"line": "intents", "version": "x", "seen": {"intents@production": [1e999, "x"]}}',
    ],
)
def test_a_record_that_no_pull_wrote_is_refused(store: Store, tmp_path: Path, text: str) -> None:
    publish(store, 1)
    pull.pull(store, REFERENCE, tmp_path / "model")
    (tmp_path / "model" / "_pulled.json").resolve().write_text(text)
    with pytest.raises(UsageError, match="expected the record of a pull"):
        pull.pull(store, REFERENCE, tmp_path / "model")


@pytest.mark.parametrize("text", ['{"files": [{"path": "a", "size_bytes": 1e400, "sha256": ""}]}', "[" * 100_000])
def test_a_manifest_in_the_destination_that_is_none_lists_nothing(store: Store, tmp_path: Path, text: str) -> None:
    publish(store, 1)
    pull.pull(store, REFERENCE, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").resolve().write_text(text)
    pull.pull(store, REFERENCE, tmp_path / "model")
    assert pulled_files(tmp_path / "model") == files_of(1)


def test_another_line_does_not_replace_the_one_that_is_served(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1)
    destination = tmp_path / "model"
    pull.pull(store, REFERENCE, destination)
    monkeypatch.setattr(small_versions, "LINE", "legal")
    publish(store, 2)
    with pytest.raises(UsageError, match=f"holds {LINE} .*; pull legal into a folder of its own"):
        pull.pull(store, "legal@production", destination)
    assert pulled_files(destination) == files_of(1)
    pull.pull(store, "legal@production", tmp_path / "legal")


def test_a_pull_that_waits_for_another_one_says_so(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    publish(store, 1)
    with ThreadPoolExecutor(1) as pool:
        with pulled_folder.PulledFolder(tmp_path / "model").locked():
            waiting = pool.submit(pull.pull, store, REFERENCE, tmp_path / "model")
            text, end = "", time.monotonic() + 200
            while "is under way: this one waits" not in text and time.monotonic() < end:
                text += capfd.readouterr().err
                time.sleep(0.01)
        waiting.result()
    assert "is under way: this one waits" in text
    assert pulled_files(tmp_path / "model") == files_of(1)


class CollectedStore(LocalStore):
    """A store from which a collection removes a version while it is read."""

    def read_range(self, path: str, start: int, size_bytes: int) -> bytes:
        self.delete([entry.path for entry in self.list(path.rpartition("/versions/")[0])])
        return super().read_range(path, start, size_bytes)


def test_a_version_that_is_collected_during_a_pull_is_not_called_broken(store: Store, tmp_path: Path) -> None:
    version = publish(store, 1).version
    with pytest.raises(TryAgain, match=f"{version}: was removed while this pulled it, .* run the same command again"):
        pull.pull(CollectedStore(store.uri), f"{LINE}@{version}", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_destination_that_is_removed_during_a_pull_means_try_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1)
    read_range = type(store).read_range
    # All files of the version are on the way when the folder goes, and no thread removes what the next pull makes.
    together = threading.Barrier(len(files_of(1)), lambda: shutil.rmtree(tmp_path / "model"), timeout=120)

    def removes_it(store: Store, path: str, start: int, size_bytes: int) -> bytes:
        together.wait()
        return read_range(store, path, start, size_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "read_range", removes_it)
        with pytest.raises(TryAgain, match="somebody removed"):
            pull.pull(store, REFERENCE, tmp_path / "model")
    pull.pull(store, REFERENCE, tmp_path / "model")
    assert pulled_files(tmp_path / "model") == files_of(1)


def test_an_export_goes_to_where_a_link_leads(store: Store, tmp_path: Path) -> None:
    publish(store, 1)
    (tmp_path / "large disk").mkdir()
    (tmp_path / "model.gguf").symlink_to(tmp_path / "large disk" / "blob")
    export.export(store, REFERENCE, "gguf-q8_0", tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").is_symlink()
    assert (tmp_path / "large disk" / "blob").read_bytes() == files_of(1)[EXPORT]


def test_an_export_whose_credentials_expire_goes_on_where_it_stopped(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1)
    ranges: list[int] = []
    read_range = type(store).read_range

    def expires(store: Store, path: str, start: int, size_bytes: int) -> bytes:
        ranges.append(start)
        if len(ranges) == 3:
            raise UsageError("ExpiredToken")
        return read_range(store, path, start, size_bytes)

    monkeypatch.setattr("qlora_retrain.storage.range_download.RANGE_BYTES", 300)
    monkeypatch.setattr(type(store), "read_range", expires)
    for attempt in (1, 2):
        if attempt == 1:
            with pytest.raises(UsageError, match="ExpiredToken"):
                export.export(store, REFERENCE, "gguf-q8_0", tmp_path / "model.gguf")
        else:
            export.export(store, REFERENCE, "gguf-q8_0", tmp_path / "model.gguf")
    assert ranges == [0, 300, 600, 600]
    assert (tmp_path / "model.gguf").read_bytes() == files_of(1)[EXPORT]
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
