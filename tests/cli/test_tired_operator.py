"""What a tired person types: misspelled names, empty variables, odd destinations, an output that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, tzinfo
from pathlib import Path

import pytest

from qlora_retrain.cli.main import main
from qlora_retrain.core import visible_text
from qlora_retrain.core.errors import Exit, UsageError
from qlora_retrain.registry import Registry
from qlora_retrain.storage import atomic_files, audit, open_store, registry
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store
from tests.storage import small_versions
from tests.storage.small_versions import LINE, REFERENCE, WEIGHTS

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def store(root_uri: str) -> Store:
    return open_store(root_uri)


@pytest.fixture
def releases(store: Store) -> list[Release]:
    """Three versions; production names the third."""
    return [small_versions.publish(store, number) for number in (1, 2, 3)]


@pytest.fixture
def call(root_uri: str, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call a verb; return its exit code and all that it printed."""

    def call(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--root", root_uri])
        assert isinstance(ended.value.code, int)
        return ended.value.code, "".join(capsys.readouterr())

    return call


def state(store: Store) -> tuple[str, int]:
    alias, _ = registry.read_alias(store, LINE, "production")
    assert alias is not None
    return alias.version, alias.generation


def file_of(store: Store, release: Release, path: str) -> Path:
    return Path(store.uri.removeprefix("file://")) / registry.version_folder(LINE, release.version) / path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("rollback LINE@production --reason x", "expected the name of a line alone"),
        ("models list ../x", "expected the name of a line alone"),
        ("rollback LINE --alias nope --reason x", "has no alias nope"),
        ("promote LINE latest --reason x", "to see those that it has, run: qlora-retrain models list"),
        ("history another", "line another has published nothing"),
        ("models verify LINE", "expected LINE@ALIAS or LINE@VERSION"),
        ("models repair LINE 20990101T000000Z-0", "has no version 20990101T000000Z-0"),
        ("pull LINE@production DEST --min-generation -1", "expected a whole number, 0 or more"),
    ],
)
def test_a_misspelled_name_is_refused_with_what_was_expected(
    call: Call, releases: list[Release], store: Store, tmp_path: Path, arguments: str, message: str
) -> None:
    before = state(store)
    words = arguments.replace("LINE", LINE).replace("DEST", str(tmp_path / "model")).split()
    code, text = call(*words)
    assert (code, message in text) == (Exit.USAGE, True), text
    assert state(store) == before


@pytest.mark.parametrize("verb", ["rollback", "promote", "reject", "repair"])
def test_no_move_is_made_for_an_empty_reason(call: Call, releases: list[Release], store: Store, verb: str) -> None:
    arguments = {"rollback": ["rollback", LINE], "promote": ["promote", LINE, releases[0].version]}
    code, text = call(*arguments.get(verb, ["models", verb, LINE, releases[0].version]), "--reason", " ")
    assert code == Exit.USAGE
    assert "expected a reason for the audit trail" in text
    assert state(store) == (releases[2].version, 3)


def test_an_empty_variable_names_no_part_and_no_destination(
    call: Call, releases: list[Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    assert call("pull", REFERENCE, str(model))[0] == Exit.DONE
    assert call("pull", REFERENCE, str(model), "--parts", "")[0] == Exit.USAGE
    assert (model / WEIGHTS).is_file()

    monkeypatch.setenv("QLORA_RETRAIN_ROOT", (tmp_path / "another").as_uri())
    with pytest.raises(SystemExit) as ended:
        main(["models", "probe", "--root", ""])
    assert ended.value.code == Exit.USAGE
    assert not (tmp_path / "another").exists()

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for arguments in (["pull", REFERENCE, ""], ["models", "export", REFERENCE, "gguf-q8_0", ""]):
        code, text = call(*arguments)
        assert (code, "expected a path" in text) == (Exit.USAGE, True)
    assert not list(Path().iterdir())


def test_from_python_one_text_is_one_name(releases: list[Release], root_uri: str, tmp_path: Path) -> None:
    models = Registry(root_uri)
    models.pull(REFERENCE, tmp_path / "model", parts="adapter")
    assert not (tmp_path / "model" / WEIGHTS).exists()
    assert models.repair(LINE, releases[0].version) == []
    with pytest.raises(UsageError, match="found an empty text"):
        Registry("")
    with pytest.raises(UsageError, match="has published nothing"):
        models.history("another")


def test_a_request_with_the_id_of_another_move_moves_nothing_and_says_so(
    call: Call, releases: list[Release], store: Store
) -> None:
    first, second, third = (release.version for release in releases)
    promote = ["--reason", "x", "--request", "ab" * 8]
    for _ in range(2):
        assert call("promote", LINE, first, "--from", third, *promote)[0] == Exit.DONE
    for arguments in (["promote", LINE, second], ["rollback", LINE]):
        code, text = call(*arguments, *promote)
        assert (code, "was used before, for another move" in text) == (Exit.USAGE, True)
    assert state(store) == (first, 4)


def test_history_is_in_the_order_of_time_and_says_what_was_no_promotion(
    call: Call, releases: list[Release], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, second, third = (release.version for release in releases)
    assert call("rollback", LINE, "--reason", "x", "--from", third)[0] == Exit.DONE

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Later:
            return cls.fromtimestamp(time.time() + 3600, tz)

    monkeypatch.setattr(registry, "datetime", Later)
    registry.move_alias(store, LINE, "canary", releases[0], reason="later", is_verified=True)
    text = call("history", LINE)[1]
    assert f"production 4: {second} (rollback)  os:" in text
    moves = [(name, move.generation) for name, move in audit.history(store, LINE)[0]]
    assert moves == [*(("production", number) for number in (1, 2, 3, 4)), ("canary", 1)]


@pytest.mark.parametrize("verb", ["pull", "export"])
@pytest.mark.parametrize("place", ["below a file", "a file", "a loop", "below a loop", "nowhere"])
def test_a_destination_that_cannot_be_a_folder_is_refused(
    call: Call, releases: list[Release], tmp_path: Path, verb: str, place: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    names = {"below a file": "file/x", "a file": "file", "a loop": "loop", "below a loop": "loop/x"}
    destination = str(tmp_path / names[place]) if place in names else "/proc/nowhere"
    arguments = ["pull", REFERENCE] if verb == "pull" else ["models", "export", REFERENCE, "gguf-q8_0"]
    code, text = call(*arguments, destination)
    assert code == Exit.USAGE, text
    assert destination in text


def test_a_pull_says_that_its_own_folder_is_damaged(call: Call, releases: list[Release], tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert call("pull", REFERENCE, str(model))[0] == Exit.DONE
    (model / "current" / "_pulled.json").write_text("")
    code, text = call("pull", REFERENCE, str(model))
    assert (code, "expected the record of a pull" in text) == (Exit.USAGE, True)

    (tmp_path / "half").mkdir()
    (tmp_path / "half" / ".pulled").touch()
    assert call("pull", REFERENCE, str(tmp_path / "half"))[0] == Exit.USAGE


def test_what_this_user_may_not_read_is_neither_lost_nor_in_the_way_of_the_others(
    call: Call, releases: list[Release], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(store)
    sha256, forbidden = type(store).sha256, file_of(store, releases[2], WEIGHTS)

    # A user who may read everything, such as root, gets this error of a local disk nowhere.
    def sha256_or_refusal(self: Store, path: str) -> str:
        with atomic_files.disk_errors(forbidden.parent):
            if path.endswith(f"{releases[2].version}/{WEIGHTS}"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(forbidden))
            return sha256(self, path)

    monkeypatch.setattr(type(store), "sha256", sha256_or_refusal)
    code, text = call("models", "repair", LINE)
    assert (code, "Permission denied" in text) == (Exit.USAGE, True)
    assert state(store) == before

    file_of(store, releases[0], WEIGHTS).write_bytes(b"other bytes")
    code, text = call("models", "verify", LINE, "--all")
    assert code == Exit.INTEGRITY
    assert f"{releases[1].version}: 6 files are what was published" in text
    assert f"qlora-retrain models repair {LINE} {releases[0].version} --root {store.uri}" in text


def test_repair_does_not_call_a_trail_whole_that_history_refuses(
    call: Call, releases: list[Release], store: Store
) -> None:
    second = next(name for name in store.children(f"models/{LINE}/audit") if name.startswith("00000002-"))
    store.delete([f"models/{LINE}/audit/{second}"])
    assert call("history", LINE)[0] == Exit.INTEGRITY
    for arguments in ([], ["--dry-run"]):
        code, text = call("models", "repair", LINE, *arguments)
        assert (code, "the entry of generation 2 is missing; cannot be mended" in text) == (Exit.INTEGRITY, True)


def test_a_damaged_alias_is_refused_with_the_command_that_mends_it(
    call: Call, releases: list[Release], store: Store, tmp_path: Path
) -> None:
    before, path = state(store), audit.alias_path(LINE, "production")
    store.swap(path, b"{", store.read(path).tag)
    for arguments in (["pull", REFERENCE, str(tmp_path / "model")], ["rollback", LINE, "--reason", "x"]):
        code, text = call(*arguments)
        assert (code, f"run: qlora-retrain models repair {LINE} --root {store.uri}" in text) == (Exit.INTEGRITY, True)
    assert call("models", "repair", LINE)[0] == Exit.DONE
    assert state(store) == before


def test_a_lost_alias_is_listed_and_hides_no_version(call: Call, releases: list[Release], store: Store) -> None:
    registry.move_alias(store, LINE, "canary", releases[0], reason="x", is_verified=True)
    store.delete([audit.alias_path(LINE, "production")])
    for arguments in (["list", LINE], ["show", f"{LINE}@{releases[0].version}"]):
        code, text = call("models", *arguments)
        assert code == Exit.INTEGRITY
        assert "alias production cannot be shown: " in text
        assert "canary" in text
    assert call("models", "repair", LINE)[0] == Exit.DONE
    assert call("models", "list", LINE)[0] == Exit.DONE


def test_an_output_that_cannot_be_written_is_no_bug_of_ours(
    releases: list[Release], store: Store, root_uri: str
) -> None:
    command = [sys.executable, "-m", "qlora_retrain.cli", "models", "list", LINE, "--root", root_uri]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == Exit.TRY_AGAIN
    assert "the output of this command cannot be written: No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr


def test_notes_that_have_no_room_stop_no_move(releases: list[Release], store: Store, root_uri: str) -> None:
    command = [sys.executable, "-m", "qlora_retrain.cli", "rollback", LINE, "--reason", "x", "--root", root_uri]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, check=False)
    assert (ended.returncode, "generation 4" in ended.stdout) == (Exit.DONE, True)
    assert state(store) == (releases[1].version, 4)


def test_a_program_that_has_no_output_stream_writes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    visible_text.protect_output()
    with contextlib.closing(sys.stdout):
        print("nobody reads this")
        sys.stdout.flush()


def test_a_destination_behind_a_folder_that_is_not_there_is_where_the_path_leads(
    call: Call, releases: list[Release], tmp_path: Path
) -> None:
    code, text = call("pull", REFERENCE, str(tmp_path / "nowhere" / ".." / "model"), "--json")
    assert code == Exit.DONE, text
    assert f'"destination": "{tmp_path / "model"}"' in text


def test_a_recipe_of_another_tool_is_none_of_a_version(call: Call, releases: list[Release], tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"recipe": []}')
    code, text = call("ask", str(tmp_path), "hello")
    assert (code, "expected the recipe of a pulled version" in text) == (Exit.USAGE, True), text
