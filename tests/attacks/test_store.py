"""Further attacks on a store with keys, of the kinds in docs/security.md: each must be refused, or change nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.publish import step as publish_step
from qlora_retrain.cli.main import main
from qlora_retrain.config.line import load
from qlora_retrain.core import uris
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.pipeline import checkpoint_sync, explain, make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes.airflow import params
from qlora_retrain.storage import artifact, audit, cache, key_admin, keys, open_store, pull, registry, signatures
from qlora_retrain.storage.artifact import File
from tests.attacks.attacker import LINE, RUN, Attacker, outcome, sha256
from tests.attacks.test_attacks import publish_next


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_routine_rotation_accepts_nothing_that_the_old_key_had_no_right_to_sign(attacker: Attacker) -> None:
    a, store = attacker, open_store(attacker.root)
    alias = f"models/{LINE}/aliases/production.json"
    a.write(alias, a.sign(alias, a.document(alias) | {"generation": 9}, a.stolen_key("train_qlora"), "planner"))
    key_admin.rotate(store, "train_qlora")
    with pytest.raises(IntegrityError, match="expected a signature by publish-intents"):
        registry.read_alias(store, LINE, "production")


def test_a_manifest_that_is_exchanged_while_a_version_is_hashed_gets_into_no_alias(attacker: Attacker) -> None:
    a, store = attacker, open_store(attacker.root)
    version = a.alias().version
    release = registry.read_release(store, LINE, version)
    path = f"models/{LINE}/versions/{version}/manifest.json"
    whole = (a.folder / path).read_bytes()
    a.write(path, a.document(path) | {"created_at": "forged"})
    registry.move_alias(store, LINE, "staging", release, reason="promoted", is_verified=True)
    (a.folder / path).write_bytes(whole)
    assert a.alias("staging").manifest_sha256 == a.alias().manifest_sha256


def test_another_lines_publisher_signs_no_release_of_this_line(attacker: Attacker) -> None:
    a = attacker
    key_admin.create(open_store(a.root), ["other"])
    plan = a.plan(text="{}")
    a.run_until(plan, "publish")
    path = a.manifest_path(plan, "publish")
    document = a.document(a.manifest_path(a.first, "publish")) | {"key": plan.step("publish").key}
    a.write(path, a.sign(path, document, a.stolen_key("publish-other"), f"publish-{LINE}"))
    assert "ends with 13" in a.run(plan.uri, "publish")


def test_two_publishers_at_once_leave_a_version_that_can_be_pulled(
    attacker: Attacker, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = attacker
    plan = a.plan(text="{}")
    a.run_until(plan, "publish")
    original = publish_step._publish

    def overtaken(*arguments: Any) -> Any:
        # Another attempt publishes the version after this one found that there is none.
        monkeypatch.setattr(publish_step, "_publish", original)
        (a.scratch / "twin").mkdir()
        original(*arguments[:-1], a.scratch / "twin")
        return original(*arguments)

    monkeypatch.setattr(publish_step, "_publish", overtaken)
    assert a.run(plan.uri, "publish") == "`publish` ends with 0"
    assert a.pull() == "`pull` gives the version that the alias names"


def test_a_planted_signature_of_the_model_is_not_published(attacker: Attacker) -> None:
    a = attacker
    plan = a.plan(text="{}")
    a.run_until(plan, "publish")
    original = registry.find_by_content

    def planted(store: Any, line: str, content: str) -> Any:
        a.write(f"models/{LINE}/versions/{plan.stamp}-{content[:12]}/model.sig", {"forged": True})
        return original(store, line, content)

    a.environment.setattr(registry, "find_by_content", planted)
    assert a.run(plan.uri, "publish") == "`publish` ends with 0"
    a.pull()
    assert "forged" not in (a.scratch / "pulled" / "model.sig").read_text()


@pytest.mark.parametrize("deed", ["file", "link", "folder link"])
def test_what_is_planted_in_a_pulled_folder_is_gone_after_the_next_pull(attacker: Attacker, deed: str) -> None:
    a = attacker
    a.pull()
    pulled, outside = a.scratch / "pulled", a.scratch / "outside"
    outside.mkdir()
    if deed == "file":
        (pulled / "model" / "modeling_evil.py").write_text("import os")
    elif deed == "link":
        shutil.move(pulled / "README.md", outside / "README.md")
        (pulled / "README.md").symlink_to(outside / "README.md")
    else:
        (outside / "x.jinja").write_text("{{ evil }}")
        (pulled / "model" / "additional_chat_templates").symlink_to(outside)
    a.pull()
    assert not (pulled / "model" / "modeling_evil.py").exists()
    version = (pulled / "current").resolve()
    assert version.parent == pulled / ".pulled"
    assert not any(path.is_symlink() for path in version.rglob("*"))
    links = {path.name: str(path.readlink()) for path in pulled.iterdir() if path.is_symlink()}
    assert links.pop("current") == f".pulled/{version.name}"
    assert links == {name: f"current/{name}" for name in links}


@pytest.mark.parametrize("deed", ["folder link", "parent link", "file link", "whole", "pipe", "owner"])
def test_a_cached_folder_holds_nothing_that_leads_elsewhere_or_belongs_to_others(tmp_path: Path, deed: str) -> None:
    files = (File(path="sub/b.txt", size_bytes=3, sha256=sha256_of(b"two")),)

    def download(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_bytes(b"two")

    folder = cache.fetch("x", "k", download, files)
    elsewhere = tmp_path / "elsewhere"
    if deed == "folder link":
        elsewhere.mkdir()
        (folder / "templates").symlink_to(elsewhere)
    elif deed == "parent link":
        shutil.move(folder / "sub", elsewhere)
        (folder / "sub").symlink_to(elsewhere)
    elif deed == "file link":
        shutil.move(folder / "sub" / "b.txt", elsewhere)
        (folder / "sub" / "b.txt").symlink_to(elsewhere)
    elif deed == "whole":
        shutil.move(folder, elsewhere)
        folder.symlink_to(elsewhere)
    elif deed == "pipe":
        (folder / "sub" / "b.txt").unlink()
        os.mkfifo(folder / "sub" / "b.txt")
    elif os.geteuid() == 0:
        os.chown(folder / "sub" / "b.txt", 12345, 12345)
    again = cache.fetch("x", "k", download, files)
    assert not again.is_symlink()
    assert not any(path.is_symlink() for path in again.rglob("*"))
    assert (again / "sub" / "b.txt").read_bytes() == b"two"
    assert {path.stat().st_uid for path in [again, *again.rglob("*")]} == {os.geteuid()}


def test_a_folder_of_the_cache_that_cannot_be_removed_is_not_used(attacker: Attacker) -> None:
    folder = cache.fetch("x", "k", lambda folder: None, ())
    (folder / "planted").write_text("x")
    attacker.environment.setattr(cache, "_remove", lambda folder: None)
    with pytest.raises(UsageError, match="planted: does not belong here, and it cannot be replaced"):
        cache.fetch("x", "k", lambda folder: None, ())


def test_the_folders_of_the_cache_are_their_owners_whatever_the_umask(node_cache: Path) -> None:
    before = os.umask(0)
    try:
        folder = cache.fetch("x", "k", lambda folder: (folder / "sub").mkdir(), ())
        with cache.work_folder() as work:
            paths = [work, work.parent, folder, folder / "sub", folder.parent]
            modes = [path.stat().st_mode & 0o022 for path in paths]
    finally:
        os.umask(before)
    assert modes == [0] * 5


def test_history_names_the_newest_move_whose_entry_was_removed(attacker: Attacker) -> None:
    a, store = attacker, open_store(attacker.root)
    publish_next(a)
    folder = a.folder / f"models/{LINE}/audit"
    for entry in folder.glob("00000002-production-*"):
        entry.unlink()
    assert any("generation 2 is missing" in fault for fault in audit.history(store, LINE)[1])
    for entry in folder.glob("*-production-*"):
        entry.unlink()
    assert any("production: the entries of the generations 1 to 2" in f for f in audit.history(store, LINE)[1])


def test_a_reason_forges_no_line_of_the_history(attacker: Attacker, capsys: pytest.CaptureFixture[str]) -> None:
    a = attacker
    reason = "x\n2026-01-01T00:00:00+00:00  production 9: good  os:alice@desk  approved"
    release = registry.read_release(open_store(a.root), LINE, a.alias().version)
    registry.move_alias(open_store(a.root), LINE, "staging", release, reason=reason)
    capsys.readouterr()
    assert call("history", LINE, "--root", a.root) == 0
    assert len(capsys.readouterr().out.strip().split("\n")) == 3


@pytest.mark.parametrize("run", ["../../outside", "../outside", "x/../../../outside", "."])
def test_a_run_is_looked_up_below_the_store_alone(attacker: Attacker, run: str) -> None:
    a = attacker
    document = a.document(f"runs/{a.first.run_id}/plan.json") | {"run_id": run}
    del document["signature"]
    a.write(f"runs/{run}/plan.json", document)
    a.write(f"runs/x/{run}/plan.json", document)
    shutil.rmtree(keys.keys_folder(a.root))  # in a store without keys, whose plans anybody may write
    with pytest.raises(UsageError):
        make_plan.find_plan(open_store(a.root), run)
    assert call("status", run, "--root", a.root) == 12


def test_status_shows_no_plan_that_the_planner_did_not_sign(
    attacker: Attacker, capsys: pytest.CaptureFixture[str]
) -> None:
    a = attacker
    path = f"runs/{a.first.run_id}/plan.json"
    a.write(path, a.document(path) | {"unchanged": "a forged version"})
    assert call("status", a.first.run_id, "--root", a.root) == 13
    assert "a forged version" not in capsys.readouterr().out


HOSTILE = [
    b'{"what": "x", "done": 1%s, "total": 2}' % (b"0" * 400),
    b'{"what": "x", "done": NaN, "total": 1e999}',
    b'{"what": "x\\u001b[2J", "done": true, "total": 2, "more": {"a": ["\\u001b]0;x\\u0007"]}}',
    b'{"code": 1%s, "cause": null, "reason": "x", "step": "y", "key": null, "attempt": null}' % (b"0" * 400),
    b'{"code": "75", "cause": "temporary", "reason": "\\u001b[2J", "step": "\\u001b[2J", "key": [], "attempt": {}}',
    b"[" * 100_000,
    b'{"what": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"what": "x", "done": 1, "total": 2, "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    b"\xff\xfe",
    b'{"what": "\\ud800", "done": 1, "total": 2}',
    b'{"code": 13, "cause": null, "reason": "\\ud800", "step": "y", "key": null, "attempt": null}',
    b'{"what": "x", "done": 1, "total": 2, "y": "%s"}' % (b"z" * 2**21),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_whatever_lies_in_a_runs_folder_the_status_can_be_shown(
    attacker: Attacker, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    a = attacker
    plan = a.plan(text="{}")
    for folder in ("status", "endings"):
        file = a.folder / f"runs/{plan.run_id}/{folder}/validate_data.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(HOSTILE[number])
    capsys.readouterr()
    assert call("status", plan.run_id, "--root", a.root, "--page", str(a.scratch / "page.html")) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert len(printed) < 100_000
    assert (a.scratch / "page.html").stat().st_size < 200_000


def test_keys_without_their_list_are_no_store_without_keys(attacker: Attacker) -> None:
    a = attacker
    (keys.keys_folder(a.root) / keys.TRUST_FILE).unlink()
    for work in (lambda: a.plan().run_id, lambda: str(a.alias())):
        with pytest.raises(UsageError, match=r"trust\.json"):
            work()


def test_the_keys_of_another_store_are_refused(attacker: Attacker, tmp_path: Path) -> None:
    a = attacker
    shutil.copytree(a.folder, tmp_path / "copy")
    a.environment.setenv(keys.KEYS_VARIABLE, str(keys.keys_folder(a.root)))
    with pytest.raises(UsageError, match="has the keys of"):
        registry.read_alias(open_store((tmp_path / "copy").as_uri()), LINE, "production")


def test_however_a_store_is_spelled_its_keys_are_the_same(attacker: Attacker) -> None:
    a = attacker
    path = a.root.removeprefix("file://")
    for spelling in (
        f"FILE://{path}",
        f"file:{path}",
        f"file://localhost{path}",
        f"file://{path}//",
        f"file:///{path}",
    ):
        assert keys.find_keyring(open_store(spelling).uri) is not None, spelling
    for spelling in (f"file://{path}/../store", f"file://{path}/./", "s3://bucket//store", "s3://bucket/a/../store"):
        with pytest.raises(UsageError):
            uris.absolute(spelling)
    assert uris.absolute("S3://bucket/store/") == "s3://bucket/store"


def test_a_process_without_the_keys_plans_nothing_though_no_alias_is_signed(attacker: Attacker) -> None:
    a = attacker
    shutil.rmtree(a.folder / "models")
    shutil.rmtree(keys.keys_folder(a.root))
    with pytest.raises(UsageError, match="is signed by planner, and this process has no keys"):
        a.plan()


def test_a_person_sees_what_they_accept(attacker: Attacker, capsys: pytest.CaptureFixture[str]) -> None:
    a = attacker
    path = f"models/{LINE}/aliases/production.json"
    document = a.document(path) | {"version": "20260101T000000Z-forged\x1b[2J"}
    a.write(path, a.sign(path, document, a.own_key(), f"publish-{LINE}"))
    capsys.readouterr()
    assert call("keys", "accept", path, "--root", a.root) == 0
    printed = capsys.readouterr().out
    assert "20260101T000000Z-forged" in printed
    assert "\x1b" not in printed
    assert sha256(a.folder / path)[:12] in printed
    assert "a key that is not known" in printed


@pytest.mark.parametrize("depth", [100, 400, 900, 3000])
def test_a_document_that_is_nested_deeply_is_refused_and_no_bug(attacker: Attacker, depth: int) -> None:
    a, deep = attacker, "[" * depth + "]" * depth
    paths = [
        f"runs/{a.first.run_id}/plan.json",
        a.manifest_path(a.first, "evaluate"),
        f"models/{LINE}/aliases/production.json",
        f"models/{LINE}/versions/{a.alias().version}/manifest.json",
    ]
    store = open_store(a.root)
    readers = [
        lambda: Plan.of_run(a.root, a.first.run_id),
        lambda: artifact.find_manifest(store, "evaluation", a.first.step("evaluate").key),
        lambda: registry.read_alias(store, LINE, "production"),
        lambda: registry.read_release(store, LINE, a.version),  # type: ignore[attr-defined]
    ]
    a.version = a.alias().version  # type: ignore[attr-defined]
    for path, read in zip(paths, readers, strict=True):
        text = (a.folder / path).read_text().rstrip().removesuffix("}")
        (a.folder / path).write_text(f'{text}, "provenance": {deep}, "extra": {deep}}}')
        with pytest.raises(IntegrityError):
            read()


def test_after_a_theft_nothing_of_the_role_is_accepted_that_an_earlier_rotation_kept(attacker: Attacker) -> None:
    a, store = attacker, open_store(attacker.root)
    key_admin.rotate(store, "evaluate")
    assert artifact.find_manifest(store, "evaluation", a.first.step("evaluate").key) is not None
    key_admin.rotate(store, "evaluate", is_stolen=True)
    with pytest.raises(IntegrityError, match="expected a signature by evaluate"):
        artifact.find_manifest(store, "evaluation", a.first.step("evaluate").key)


def test_a_planted_folder_with_an_odd_name_stops_no_drop(attacker: Attacker) -> None:
    a = attacker
    a.write("artifacts/model/\x1b[2J/_manifest.json", {})
    dropped = artifact.drop(open_store(a.root), "dataset", a.first.step("validate_data").key)
    assert len(dropped) == 5


def test_a_link_in_the_place_of_a_file_is_neither_published_nor_are_its_targets_rights_changed(
    attacker: Attacker,
) -> None:
    a = attacker
    plan = a.plan(text="{}")
    a.run_until(plan, "publish")
    manifest = a.document(a.manifest_path(plan, "merge_adapter"))
    file = a.folder / f"artifacts/model/{manifest['key']}/{manifest['attempt']}/model.safetensors"
    secret = a.scratch / "secret"
    secret.write_bytes(file.read_bytes()[:-1] + b"x")  # of the same size
    secret.chmod(0o600)
    file.unlink()
    file.symlink_to(secret)
    assert "ends with 13" in a.run(plan.uri, "publish")
    assert secret.stat().st_mode & 0o777 == 0o600
    assert not any(path.is_symlink() for path in (a.folder / "models").rglob("*"))


def test_a_drop_removes_nothing_that_a_planted_link_leads_to(attacker: Attacker) -> None:
    a = attacker
    key = a.first.step("validate_data").key
    (a.folder / f"artifacts/dataset/{key}/linked").symlink_to(a.folder / "models")
    before = sorted((a.folder / "models").rglob("*"))
    with pytest.raises(UsageError, match="linked: is a link"):
        artifact.drop(open_store(a.root), "dataset", key)
    assert sorted((a.folder / "models").rglob("*")) == before


def test_a_step_writes_nothing_where_a_planted_link_leads_to(attacker: Attacker) -> None:
    a = attacker
    plan, outside = a.plan(text="{}"), a.scratch / "outside"
    outside.mkdir()
    (outside / "validate_data.json").write_text("{}")
    for name in ("logs", "status", "endings"):
        (a.folder / f"runs/{plan.run_id}/{name}").symlink_to(outside)
    assert a.run(plan.uri, "validate_data") == "`validate_data` ends with 0"
    assert [path.name for path in outside.iterdir()] == ["validate_data.json"]


def test_a_document_of_very_many_values_is_refused_before_it_is_parsed(attacker: Attacker) -> None:
    a = attacker
    with pytest.raises(ValueError, match="values"):
        signatures.parse_fields(b'{"a": [' + b"[]," * 8_000_000 + b"0]}")
    (a.folder / f"runs/{RUN}").mkdir()
    (a.folder / f"runs/{RUN}/plan.json").write_bytes(b'{"a": [' + b"[]," * 8_000_000 + b"0]}")
    assert a.plan().champion is not None


@pytest.mark.parametrize("depth", [60, 100, 400, 900, 3000])
def test_a_marker_that_is_nested_deeply_is_passed_over(attacker: Attacker, depth: int) -> None:
    a = attacker
    plan = a.plan(text="{}")
    a.run_until(plan, "train_qlora")
    folder = a.folder / f"scratch/train_qlora/{plan.step('train_qlora').key}/0123456789ab/checkpoint-300"
    folder.mkdir(parents=True)
    (folder / "x").write_text("x")
    entry = json.dumps({"path": "x", "size": 1, "sha256": sha256(folder / "x")})
    deep = "[" * depth + "]" * depth
    (folder / "_complete.json").write_text(f'{{"step": 300, "files": [{entry}], "deep": {deep}}}')
    assert a.run(plan.uri, "train_qlora") == "`train_qlora` ends with 0"


@pytest.fixture
def consumer(attacker: Attacker) -> Attacker:
    """The same store, seen by a consumer who has no keys and has pulled nothing yet."""
    publish_next(attacker)
    shutil.rmtree(keys.keys_folder(attacker.root))
    return attacker


@pytest.mark.parametrize("deed", ["keeps the signature", "takes it away"])
def test_an_alias_that_was_moved_is_refused_by_a_consumer_without_keys(consumer: Attacker, deed: str) -> None:
    a = consumer
    path = f"models/{LINE}/aliases/production.json"
    before = next(iter(sorted(open_store(a.root).children(f"models/{LINE}/versions"))))
    sha = sha256(a.folder / f"models/{LINE}/versions/{before}/manifest.json")
    document = a.document(path) | {"version": before, "manifest_sha256": sha, "generation": 9}
    if deed == "takes it away":
        del document["signature"]
    a.write(path, document)
    assert "ends with 13" in a.pull()


def test_no_planted_alias_stands_for_a_version(consumer: Attacker) -> None:
    a = consumer
    older, newer = sorted(open_store(a.root).children(f"models/{LINE}/versions"))
    sha = sha256(a.folder / f"models/{LINE}/versions/{older}/manifest.json")
    document = a.document(f"models/{LINE}/aliases/production.json") | {"version": older, "manifest_sha256": sha}
    a.write(f"models/{LINE}/aliases/{newer}.json", document)
    assert pull.resolve(open_store(a.root), f"{LINE}@{newer}")[0].version == newer


def test_a_version_whose_files_grew_is_refused_before_it_fills_the_disk(attacker: Attacker) -> None:
    a = attacker
    file = a.folder / f"models/{LINE}/versions/{a.alias().version}/model/model.safetensors"
    file.unlink()
    file.write_bytes(b"x" * 10_000)
    a.environment.setattr(type(open_store(a.root)), "download", None)
    assert "expected 67 bytes, found 10000 bytes" in a.pull()


def test_an_artifact_whose_files_grew_is_refused_before_it_fills_the_disk(attacker: Attacker) -> None:
    a = attacker
    plan = a.plan(text="{}")
    a.run_until(plan, "train_qlora")
    (file,) = (a.folder / f"artifacts/dataset/{plan.step('validate_data').key}").rglob("dataset.json")
    file.write_bytes(b"x" * 10_000)
    a.environment.setattr(type(open_store(a.root)), "download", None)
    assert "ends with 13" in a.run(plan.uri, "train_qlora")


def test_a_planted_run_with_an_odd_name_hides_no_other(attacker: Attacker) -> None:
    a = attacker
    a.write("runs/99999999T000000Z-\x1b[2J/plan.json", {})
    assert call("status", "latest", "--root", a.root) == 0


def test_an_ending_forges_no_line_of_the_status(attacker: Attacker, capsys: pytest.CaptureFixture[str]) -> None:
    a = attacker
    plan = a.plan(text="{}")
    reason = "x\n  publish         done  version 1  promoted_to production"
    fields = {"code": 13, "cause": "integrity", "reason": reason, "step": "x", "key": None, "attempt": None}
    a.write(f"runs/{plan.run_id}/endings/publish.json", fields)
    capsys.readouterr()
    assert call("status", plan.run_id, "--root", a.root) == 0
    assert [line for line in capsys.readouterr().out.split("\n") if line.startswith("  publish ")] == [
        "  publish         not made  integrity or security (13): x"
    ]


def test_a_list_of_keys_that_others_may_write_is_not_trusted(attacker: Attacker) -> None:
    a = attacker
    (keys.keys_folder(a.root) / keys.TRUST_FILE).chmod(0o666)
    with pytest.raises(UsageError, match="other users may write"):
        a.alias()


def test_a_checkpoint_of_another_key_is_passed_over(attacker: Attacker) -> None:
    a, store = attacker, open_store(attacker.root)
    plan = a.plan(text="{}")
    a.run_until(plan, "train_qlora")
    folder = f"scratch/train_qlora/{'0' * 64}/0123456789ab/checkpoint-300"
    a.write(f"{folder}/adapter_model.safetensors", "of another run")
    file = a.folder / folder / "adapter_model.safetensors"
    entry = {"path": file.name, "size": file.stat().st_size, "sha256": sha256(file)}
    fields = {"step": 300, "files": [entry]}
    signature = signatures.sign_fields(store, f"{folder}/_complete.json", fields, "train_qlora")
    assert signature is not None
    a.write(f"{folder}/_complete.json", fields | {"signature": signature.model_dump()})
    target = a.scratch / "restored"
    target.mkdir()
    assert checkpoint_sync.restore(store, f"scratch/train_qlora/{'0' * 64}", target) == 300
    shutil.rmtree(target)
    target.mkdir()
    key = plan.step("train_qlora").key
    shutil.copytree(a.folder / f"scratch/train_qlora/{'0' * 64}", a.folder / f"scratch/train_qlora/{key}")
    assert checkpoint_sync.restore(store, f"scratch/train_qlora/{key}", target) is None


def test_an_empty_key_is_no_leave_to_trust_any(attacker: Attacker) -> None:
    a = attacker
    pulled = str(a.scratch / "pulled")
    assert call("pull", f"{LINE}@production", pulled, "--root", a.root, "--verify-key", "") == 12


def test_the_folder_above_the_keys_is_their_owners_whatever_the_umask(attacker: Attacker) -> None:
    a = attacker
    a.environment.setenv("XDG_CONFIG_HOME", str(a.scratch / "config"))
    before = os.umask(0)
    try:
        key_admin.create(open_store((a.scratch / "second").as_uri()))
    finally:
        os.umask(before)
    assert not any(p.stat().st_mode & 0o022 for p in [a.scratch / "config", *(a.scratch / "config").rglob("*")])


@pytest.mark.parametrize(
    ("gate", "is_refused"),
    [
        ("data: {max_quarantined_fraction: 0.01}", True),
        ("evaluate: {min_gain_over_base: 0.3}", True),
        ("publish: {promote_to: null}", True),
        ("data: {max_quarantined_fraction: 0.2}", False),
        ("train: {learning_rate: 0.001}", False),
    ],
)
def test_nobody_finishes_an_older_run_by_gates_that_are_stricter_now(
    attacker: Attacker, gate: str, is_refused: bool
) -> None:
    a = attacker
    a.line.write_text(a.line.read_text() + gate + "\n")
    changes = explain.setting_changes(a.first, load(a.line))
    ending = outcome("task 0", lambda: str(params.refuse_other_judgement(a.first.run_id, changes)))
    assert ("ends with 12" in ending and "in the line now" in ending) is is_refused


def test_new_keys_accept_nothing_that_lost_keys_signed_unless_a_person_says_so(attacker: Attacker) -> None:
    a, store = attacker, open_store(attacker.root)
    shutil.rmtree(keys.keys_folder(a.root))
    assert call("keys", "create", "--line", LINE, "--root", a.root) == 12
    assert keys.find_keyring(a.root) is None
    assert call("keys", "create", "--line", LINE, "--lost", "--root", a.root) == 0
    assert registry.read_alias(store, LINE, "production")[0] is not None


def sha256_of(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
