"""What is said to an operator is true, and each command that is printed, copied into a shell, ends as it was said."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.cli.main import main
from qlora_retrain.core.errors import Exit
from qlora_retrain.storage import audit, key_admin, open_store, registry, repair
from qlora_retrain.storage.registry import LATEST, Alias, Release
from qlora_retrain.storage.store import Document, Store
from tests.storage import small_versions
from tests.storage.small_versions import LINE, REFERENCE, WEIGHTS

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "it's a store").as_uri())


@pytest.fixture
def releases(store: Store) -> list[Release]:
    """Three versions; production names the third."""
    return [small_versions.publish(store, number) for number in (1, 2, 3)]


@pytest.fixture
def call(store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call a verb; return its exit code and all that it printed."""
    monkeypatch.setenv("QLORA_RETRAIN_ROOT", store.uri)

    def call(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        assert isinstance(ended.value.code, int)
        return ended.value.code, "".join(capsys.readouterr())

    return call


def commands_in(text: str, verb: str) -> list[list[str]]:
    """Return the arguments of each command that was printed, as a shell passes them on."""
    parts = text.replace("\n", " qlora-retrain ").split("qlora-retrain ")
    return [shlex.split(part) for part in parts if part.startswith(f"{verb} ")]


def production(store: Store) -> Alias:
    state, _ = registry.read_alias(store, LINE, "production")
    assert state is not None
    return state


def remove(store: Store, release: Release, *paths: str) -> None:
    folder = registry.version_folder(LINE, release.version)
    store.delete([f"{folder}/{path}" for path in paths or [*(f.path for f in release.files), "manifest.json"]])


def test_a_rejection_by_hand_of_what_a_promotion_left_is_no_rollback(
    call: Call, releases: list[Release], store: Store
) -> None:
    first, second, third = (release.version for release in releases)
    assert call("models", "reject", LINE, second, "--reason", "it swears")[0] == Exit.DONE
    code, text = call("rollback", LINE, "--from", second, "--reason", "x")
    assert (code, f"names {third} now" in text) == (Exit.USAGE, True), text
    code, text = call("rollback", LINE, "--reason", "x")
    assert (code, production(store).version) == (Exit.DONE, first), text
    # After a rollback a rejection by hand leaves that the last move, with who made it and why.
    registry.move_alias(store, LINE, "production", releases[2], reason="x", override=True, is_verified=True)
    assert call("rollback", LINE, "--reason", "bad answers")[0] == Exit.DONE
    call("models", "unreject", LINE, second, "--reason", "another matter")
    code, text = call("rollback", LINE, "--reason", "x")
    assert (code, f"left {third} at" in text, "(bad answers)" in text) == (Exit.USAGE, True, True), text


def test_a_reason_that_looks_like_an_option_is_printed_as_a_reason(
    call: Call, releases: list[Release], store: Store
) -> None:
    third = releases[2].version
    assert call("rollback", LINE, "--reason=-h: it's bad", "--from", third)[0] == Exit.DONE
    same, further = commands_in(call("rollback", LINE, "--reason=-h: it's bad")[1], "rollback")
    assert call(*same)[0] == Exit.DONE
    assert production(store).generation == 4
    assert call(*further)[0] == Exit.DONE
    assert (production(store).generation, production(store).reason) == (5, "-h: it's bad")


def test_the_only_version_of_a_line_is_left_by_a_promotion(call: Call, store: Store) -> None:
    release = small_versions.publish(store, 1)
    code, text = call("models", "reject", LINE, release.version, "--reason", "x")
    assert (code, "no earlier version to go back to" in text) == (Exit.USAGE, True), text
    assert not commands_in(text, "rollback")
    assert len(commands_in(text, "promote")) == 1


def test_a_rollback_to_a_broken_version_says_how_to_go_past_it(
    call: Call, releases: list[Release], store: Store
) -> None:
    remove(store, releases[1], WEIGHTS)
    code, text = call("rollback", LINE, "--reason", "bad answers")
    assert code == Exit.INTEGRITY
    for command in (*commands_in(text, "promote"), *commands_in(text, "models reject")):
        assert call(*command)[0] == Exit.DONE
    state = production(store)
    assert (state.version, state.rejected) == (releases[0].version, (releases[2].content_hash,))


def test_what_verify_prints_mends_the_version_that_it_names(call: Call, releases: list[Release], store: Store) -> None:
    remove(store, releases[0], WEIGHTS)
    for arguments in ([LINE, "--all"], [f"{LINE}@{releases[0].version}"]):
        code, text = call("models", "verify", *arguments)
        assert code == Exit.INTEGRITY
        (command,) = commands_in(text, "models repair")
        assert releases[0].version in command
        # No artifact has the weights, and that is said.
        code, text = call(*command)
        assert (code, WEIGHTS in text) == (Exit.INTEGRITY, True), text


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_version_in_production_that_is_lost_is_seen_by_every_verb(
    call: Call, releases: list[Release], store: Store, tmp_path: Path, is_whole: bool
) -> None:
    remove(store, releases[2], *([] if is_whole else ["manifest.json"]))
    for arguments in (
        ["models", "list", LINE],
        ["models", "show", REFERENCE],
        ["models", "verify", REFERENCE],
        ["models", "verify", LINE, "--all"],
        ["pull", REFERENCE, str(tmp_path / "model")],
    ):
        code, text = call(*arguments)
        assert (code, releases[2].version in text) == (Exit.INTEGRITY, True), text
    # The command that each of them prints leads production to the newest version that is whole.
    assert call(*commands_in(text, "models repair")[0])[0] == Exit.DONE
    assert production(store).version == releases[1].version
    assert call("models", "list", LINE)[0] == Exit.DONE


def test_a_file_that_somebody_put_into_the_trail_is_removed_and_a_hidden_one_is_none(
    call: Call, releases: list[Release], store: Store
) -> None:
    folders = [f"models/{LINE}/aliases", f"models/{LINE}/audit", "models"]
    for folder in folders:
        store.write_if_absent(f"{folder}/.DS_Store", b"x")
    assert call("history", LINE)[0] == Exit.DONE
    assert call("models", "repair", LINE)[0] == Exit.DONE
    assert ".DS_Store" not in call("models", "list", "intent")[1]

    strangers = [f"{folder}/production.json.bak" for folder in folders[:2]]
    for path in strangers:
        store.write_if_absent(path, b"x")
    findings = repair.repair(store, LINE, reason="x")
    assert [finding.fault.partition(": ")[0] for finding in findings] == [f"{store.uri}/{p}" for p in strangers[::-1]]
    assert all(finding.remedy.startswith("remove that file") for finding in findings)


def test_an_alias_that_somebody_led_out_of_the_line_hides_nothing_else(
    call: Call, releases: list[Release], store: Store
) -> None:
    path = audit.alias_path(LINE, "canary")
    store.write_if_absent(path, production(store).model_copy(update={"version": "../x"}).model_dump_json().encode())
    code, text = call("models", "list", LINE)
    assert (code, "alias canary names '../x'" in text, releases[0].version in text) == (Exit.INTEGRITY, True, True)
    code, text = call("models", "verify", LINE, "--all")
    assert code != Exit.DONE
    assert f"{releases[0].version}: 6 files are what was published" in text


def test_entries_of_a_long_trail_are_read_side_by_side(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 5):
        small_versions.publish(store, number)
    read, pair = type(store).read, threading.Barrier(2, timeout=90)

    def read_together(self: Store, path: str) -> Document:
        if "/audit/" in path:
            pair.wait()
        return read(self, path)

    monkeypatch.setattr(type(store), "read", read_together)
    states, faults = audit.history(store, LINE)
    assert ([state.generation for _, state in states], faults) == ([1, 2, 3, 4], [])


def test_after_a_stolen_key_repair_says_what_has_to_be_accepted_before_the_next_publication(
    call: Call, store: Store
) -> None:
    key_admin.create(store, lines=[LINE])
    release = small_versions.publish(store, 1)
    registry.move_alias(store, LINE, LATEST, release, reason="x", is_verified=True)
    key_admin.rotate(store, f"publish-{LINE}", is_stolen=True)
    manifest = f"{registry.version_folder(LINE, release.version)}/manifest.json"
    key_admin.accept(store, [audit.alias_path(LINE, "production"), manifest])

    code, text = call("models", "repair", LINE)
    assert code == Exit.INTEGRITY
    (command,) = commands_in(text.replace("; otherwise", "\n"), "keys accept")
    assert call(*command)[0] == Exit.DONE
    newer = small_versions.publish(store, 2)
    assert registry.move_alias(store, LINE, LATEST, newer, reason="x", is_verified=True)
