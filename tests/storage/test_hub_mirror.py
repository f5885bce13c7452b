"""Mirrors in a repository of the Hugging Face Hub: what is there afterwards, also after faults, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_retrain.cli.main import main
from qlora_retrain.core.errors import IntegrityError, TryAgain, UsageError
from qlora_retrain.storage import key_admin, keys, mirror, open_store, registry
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store
from tests import hub_repository
from tests.hub_repository import ATTRIBUTES, NAME, Blob, HubRepository
from tests.storage.small_versions import LINE, WEIGHTS, files_of, publish

TO = f"hf://{NAME}"
MANIFEST = "manifest.json"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubRepository]:
    with hub_repository.serve(monkeypatch) as server:
        yield server


@pytest.fixture(autouse=True)
def own_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_RETRAIN_WORK", str(tmp_path / "work"))
    return tmp_path / "work"


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def expected_files(store: Store, release: Release, number: int) -> dict[str, bytes]:
    manifest = store.read(f"{registry.version_folder(LINE, release.version)}/{MANIFEST}").data
    return {**files_of(number), MANIFEST: manifest}


def test_a_version_is_under_its_tag_with_every_byte_and_main_follows_production(
    store: Store, hub: HubRepository, own_work_folder: Path
) -> None:
    first = publish(store, 1)
    result = mirror.mirror(store, LINE, "production", TO)
    assert (result.version, result.is_new, result.is_production) == (first.version, True, True)
    assert result.place == f"{hub.url}/{NAME}/tree/{first.version}"
    second = publish(store, 2)
    assert mirror.mirror(store, LINE, second.version, TO).is_new

    assert hub.content(first.version) == expected_files(store, first, 1)
    assert hub.content(second.version) == hub.content("main") == expected_files(store, second, 2)
    assert set(hub.branches) == {"main"}
    assert ATTRIBUTES in hub.commits[hub.tags[second.version]]
    assert list(own_work_folder.iterdir()) == []

    # After a rollback main goes back, and nothing is uploaded for it.
    registry.rollback(store, LINE, "production", reason="worse")
    hub.requests.clear()
    result = mirror.mirror(store, LINE, "production", TO)
    assert (result.version, result.is_new) == (first.version, False)
    assert hub.content("main") == expected_files(store, first, 1)
    assert not [request for request in hub.requests if request.startswith("PUT") or "objects/batch" in request]
    assert hub.content(second.version) == expected_files(store, second, 2)


def test_a_version_that_production_does_not_name_leaves_main_alone_and_a_second_call_changes_nothing(
    local_store: Store, hub: HubRepository
) -> None:
    first, _ = publish(local_store, 1), publish(local_store, 2)
    main = hub.branches["main"]
    assert not mirror.mirror(local_store, LINE, first.version, TO).is_production
    commits = dict(hub.commits)
    assert not mirror.mirror(local_store, LINE, first.version, TO).is_new
    assert hub.branches == {"main": main}
    assert hub.commits == commits
    assert hub.content(first.version) == expected_files(local_store, first, 1)


def test_what_is_in_main_and_no_file_of_the_version_goes_but_for_the_hubs_own(
    local_store: Store, hub: HubRepository
) -> None:
    hub.branches["main"] = hub.add_commit({**hub.commits[hub.branches["main"]], "old/pytorch_model.bin": Blob(b"x")})
    release = publish(local_store, 1)
    mirror.mirror(local_store, LINE, "production", TO)
    assert hub.content("main") == hub.content(release.version) == expected_files(local_store, release, 1)


def other_bytes(hub: HubRepository, commit: str) -> None:
    hub.commits[commit]["README.md"] = Blob(b"# another card\n")


def other_weights(hub: HubRepository, commit: str) -> None:
    hub.large["0" * 64] = b"other weights"
    hub.commits[commit][WEIGHTS] = Blob(lfs="0" * 64, size=13)


def fewer_files(hub: HubRepository, commit: str) -> None:
    del hub.commits[commit]["recipe.json"]


def more_files(hub: HubRepository, commit: str) -> None:
    hub.commits[commit]["modeling.py"] = Blob(b"import os\n")


@pytest.mark.parametrize("change", [other_bytes, other_weights, fewer_files, more_files])
def test_a_tag_with_other_files_is_refused_and_left_as_it_is(
    local_store: Store, hub: HubRepository, change: Callable[[HubRepository, str], None]
) -> None:
    release = publish(local_store, 1)
    mirror.mirror(local_store, LINE, release.version, TO)
    change(hub, hub.tags[release.version])
    before = dict(hub.tags), hub.content(release.version)
    with pytest.raises(IntegrityError, match=release.version):
        mirror.mirror(local_store, LINE, release.version, TO)
    assert (hub.tags, hub.content(release.version)) == before


@pytest.mark.parametrize("change", [other_bytes, other_weights, fewer_files])
def test_a_hub_that_gets_other_bytes_than_were_uploaded_gives_no_tag_and_main_stays(
    local_store: Store, hub: HubRepository, change: Callable[[HubRepository, str], None]
) -> None:
    release, main = publish(local_store, 1), hub.branches["main"]

    def tamper(method: str, path: str) -> bool:
        if "/commit/" in path:
            change(hub, hub.branches[f"mirror-{release.version}"])
        return False

    hub.after = tamper
    with pytest.raises(IntegrityError, match=r"other bytes|missing"):
        mirror.mirror(local_store, LINE, release.version, TO)
    assert hub.tags == {}
    assert hub.branches["main"] == main


def test_bytes_of_the_store_that_are_not_what_was_published_are_never_uploaded(
    local_store: Store, hub: HubRepository, tmp_path: Path
) -> None:
    release = publish(local_store, 1)
    path = tmp_path / "store" / registry.version_folder(LINE, release.version) / WEIGHTS
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match="is not what was published"):
        mirror.mirror(local_store, LINE, "production", TO)
    assert (hub.tags, hub.large) == ({}, {})


def writes_of(hub: HubRepository) -> list[str]:
    return [r for r in hub.requests if not r.startswith("GET") and "paths-info" not in r and "validate" not in r]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [2, 5, 8])
def test_a_mirror_that_dies_at_a_write_ends_as_without_it_when_it_is_tried_again(
    local_store: Store, hub: HubRepository, when: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(local_store, 1)
    assert dies_and_is_completed(local_store, hub, publish(local_store, 2), when, number, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_mirror_may_die_at_any_write(
    local_store: Store, hub: HubRepository, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(local_store, 1)
    release, number = publish(local_store, 2), 1
    while dies_and_is_completed(local_store, hub, release, when, number, monkeypatch):
        reset(hub)
        number += 1
    assert number > 8


def dies_and_is_completed(
    store: Store, hub: HubRepository, release: Release, when: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Mirror with every write failing from that number on, then again; return whether the first one failed."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries an upload again
    count = 0

    def fails(method: str, path: str) -> bool:
        nonlocal count
        count += method != "GET" and "paths-info" not in path and "validate" not in path
        return count >= number

    # A process that was killed asks for nothing any more.
    if when == "before":
        hub.before = lambda method, path: 503 if fails(method, path) else 0
    else:
        hub.after = fails
    try:
        mirror.mirror(store, LINE, "production", TO)
        has_died = False
    except TryAgain:
        has_died = True
    # A tag is there only with all of its files.
    assert all(hub.content(tag) == expected_files(store, release, 2) for tag in hub.tags)

    hub.before, hub.after = lambda method, path: 0, lambda method, path: False
    mirror.mirror(store, LINE, "production", TO)
    assert hub.content("main") == hub.content(release.version) == expected_files(store, release, 2)
    assert set(hub.branches) == {"main"}
    return has_died


def reset(hub: HubRepository) -> None:
    hub.tags.clear()
    hub.large.clear()
    hub.commits.clear()
    hub.branches.clear()
    hub.requests.clear()
    hub.branches["main"] = hub.add_commit({ATTRIBUTES: Blob(b"*.safetensors filter=lfs\n")})


def test_somebody_who_commits_to_main_meanwhile_is_not_overwritten_and_the_next_try_ends(
    local_store: Store, hub: HubRepository
) -> None:
    publish(local_store, 1)

    def interfere(method: str, path: str) -> int:
        if path.endswith("/commit/main"):
            hub.before = lambda method, path: 0
            hub.branches["main"] = hub.add_commit({**hub.commits[hub.branches["main"]], "note.md": Blob(b"note")})
        return 0

    hub.before = interfere
    with pytest.raises(TryAgain, match="answered 412"):
        mirror.mirror(local_store, LINE, "production", TO)
    mirror.mirror(local_store, LINE, "production", TO)
    assert "note.md" not in hub.content("main")


def test_a_rollback_during_an_upload_is_followed(local_store: Store, hub: HubRepository) -> None:
    first, second = publish(local_store, 1), publish(local_store, 2)
    mirror.mirror(local_store, LINE, first.version, TO)

    def roll_back(method: str, path: str) -> int:
        if path == f"/api/models/{NAME}/commit/mirror-{second.version}":
            registry.rollback(local_store, LINE, "production", reason="worse")
        return 0

    hub.before = roll_back
    assert not mirror.mirror(local_store, LINE, second.version, TO).is_production
    assert set(hub.tags) == {first.version, second.version}
    assert hub.content("main") == {}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_no_right_or_no_repository_says_what_to_do_and_shows_no_token(
    local_store: Store, hub: HubRepository, status: int
) -> None:
    publish(local_store, 1)
    hub.before = lambda method, path: status
    with pytest.raises(UsageError, match=f"answered {status}.*hf repos create {NAME}") as refused:
        mirror.mirror(local_store, LINE, "production", TO)
    assert hub_repository.TOKEN not in str(refused.value)


def test_an_upload_that_is_refused_shows_no_signature(local_store: Store, hub: HubRepository) -> None:
    publish(local_store, 1)
    hub.before = lambda method, path: 400 if method == "PUT" else 0
    with pytest.raises(UsageError, match="answered 400") as refused:
        mirror.mirror(local_store, LINE, "production", TO)
    assert "secret" not in str(refused.value)


def test_an_upload_that_is_tried_again_logs_no_signature(
    local_store: Store, hub: HubRepository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    publish(local_store, 1)
    answers = iter([503])
    hub.before = lambda method, path: next(answers, 0) if method == "PUT" else 0
    mirror.mirror(local_store, LINE, "production", TO)
    assert "HTTP Error 503 thrown while requesting PUT" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("name", "text"), [("HF_TOKEN", "hf_a\nb"), ("HF_TOKEN", "hf_\u20ac"), ("HF_ENDPOINT", "huggingface.example")]
)
def test_what_cannot_be_sent_is_no_reason_to_try_again(
    local_store: Store, hub: HubRepository, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    publish(local_store, 1)
    monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match="HF_TOKEN or HF_ENDPOINT cannot be sent"):
        mirror.mirror(local_store, LINE, "production", TO)
    # A line break at the end of a variable is no part of the token.
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", f"{hub_repository.TOKEN}\n")
    assert mirror.mirror(local_store, LINE, "production", TO).is_new


def test_a_model_card_that_the_hub_refuses_is_said_before_anything_is_uploaded(
    local_store: Store, hub: HubRepository
) -> None:
    publish(local_store, 1)
    hub.before = lambda method, path: 400 if path == "/api/validate-yaml" else 0
    with pytest.raises(UsageError, match="answered 400: Invalid metadata in README"):
        mirror.mirror(local_store, LINE, "production", TO)
    assert (hub.large, hub.tags) == ({}, {})


# The client warns of a card without metadata. Who holds warnings back does it for all threads, and so does who ends it.
@pytest.mark.filterwarnings("ignore:Warnings while validating metadata")
def test_processes_that_mirror_at_once_end_with_the_same_tag_and_main(local_store: Store, hub: HubRepository) -> None:
    publish(local_store, 1)
    release = publish(local_store, 2)

    def act(_: int) -> str:
        for _ in range(20):
            try:
                return mirror.mirror(local_store, LINE, "production", TO).version
            except TryAgain:
                continue
        raise AssertionError("it never ended")

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(act, range(4))) == {release.version}
    # A slower one may have created its branch after another had deleted it.
    mirror.mirror(local_store, LINE, "production", TO)
    assert set(hub.branches) == {"main"}
    assert hub.content("main") == hub.content(release.version) == expected_files(local_store, release, 2)


def test_a_signed_store_is_checked_by_a_role_without_a_private_key(
    local_store: Store, hub: HubRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_admin.create(local_store, [LINE])
    release = publish(local_store, 1)
    key_admin.export(local_store, [keys.MIRROR], tmp_path / "public")
    assert [file.name for file in (tmp_path / "public").iterdir()] == [keys.TRUST_FILE]
    monkeypatch.setenv(keys.KEYS_VARIABLE, str(tmp_path / "public"))
    mirror.mirror(local_store, LINE, "production", TO)
    assert b'"signature"' in hub.content("main")[MANIFEST]

    # Somebody else who may write to the store moves the alias, and signs nothing.
    path = tmp_path / "store" / "models" / LINE / "aliases" / "production.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "signature": None}))
    with pytest.raises(IntegrityError, match="no valid signature"):
        mirror.mirror(local_store, LINE, release.version, TO)


@pytest.mark.parametrize(
    "destination", ["hf://owner", "hf://owner/name/more", "hf://owner/..", "s3://a/b", "MLFLOW", ""]
)
def test_a_destination_that_is_none_is_refused(local_store: Store, destination: str) -> None:
    with pytest.raises(UsageError, match="expected hf://owner/name, or mlflow"):
        mirror.mirror(local_store, LINE, "production", destination)


def test_the_command_says_where_the_version_is_and_takes_the_token_from_a_mounted_secret(
    local_store: Store, hub: HubRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    release = publish(local_store, 1)
    (tmp_path / "HF_TOKEN").write_text(f"{hub_repository.TOKEN}\n")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("QLORA_RETRAIN_MIRROR_SECRET", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["mirror", LINE, "production", "--to", TO, "--root", local_store.uri])
    output = capsys.readouterr()
    assert ended.value.code == 0, output.err
    place = f"{hub.url}/{NAME}/tree/{release.version}"
    assert output.out == f"{LINE} {release.version}: put at {place}, verified, and is production there\n"
    assert hub_repository.TOKEN not in output.out + output.err
