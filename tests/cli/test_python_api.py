"""A team that did not train the model uses `qlora_retrain.registry`: what the command refuses, Python refuses too."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from qlora_retrain.core.errors import UsageError
from qlora_retrain.registry import Registry
from qlora_retrain.storage import audit, key_admin, keys
from tests.storage import small_versions
from tests.storage.small_versions import LINE, REFERENCE


@pytest.fixture
def models(tmp_path: Path) -> Registry:
    """A store with one version."""
    registry = Registry(tmp_path / "store")
    small_versions.publish(registry.store, 1)
    return registry


def test_a_registry_says_which_store_it_is_of_and_takes_a_path(models: Registry, tmp_path: Path) -> None:
    uri = (tmp_path / "store").as_uri()
    assert repr(models) == f"Registry({uri!r})"
    assert Registry(uri).list(LINE).num_versions == Registry(str(tmp_path / "store")).list(LINE).num_versions == 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda models, line: models.list(line),
        lambda models, line: models.versions(line),
        lambda models, line: models.history(line),
        lambda models, line: models.repair(line),
    ],
)
def test_a_line_that_published_nothing_is_refused_with_those_that_did(
    models: Registry, ask: Callable[[Registry, str], object]
) -> None:
    with pytest.raises(UsageError, match=r"line intent has published nothing.* lines that have: intents"):
        ask(models, "intent")
    for name in ("", "../x", "a/b", "Intents"):
        with pytest.raises(UsageError, match="expected the name of a line alone"):
            ask(models, name)


def test_what_no_line_is_called_becomes_part_of_no_path(models: Registry, tmp_path: Path) -> None:
    version = models.versions(LINE)[0]
    calls: list[Callable[[], object]] = [
        lambda: models.show("../x@production"),
        lambda: models.verify(f"../x@{version}"),
        lambda: models.pull("../x@production", tmp_path / "model"),
        lambda: models.export("../x@production", "gguf-q8_0", tmp_path / "model"),
        lambda: models.promote("../x", version, reason="x"),
        lambda: models.rollback("../x", reason="x"),
        lambda: models.reject("../x", version, reason="x"),
        lambda: models.unreject("../x", version, reason="x"),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"'\.\./x': expected the name of a line alone"):
            call()
    with pytest.raises(UsageError, match="can be the name of neither an alias nor a version"):
        models.verify(f"{LINE}@../../x")


def test_an_empty_root_says_that_it_is_empty_and_a_probe_makes_no_folder(tmp_path: Path) -> None:
    models = Registry(tmp_path / "misspelled")
    with pytest.raises(UsageError, match="look whether the root is the right one"):
        models.list(LINE)
    with pytest.raises(UsageError, match="expected the root of a store, found no such folder"):
        models.probe()
    with pytest.raises(UsageError, match="expected the root of a store, found nothing there"):
        models.gc(delete=True)
    assert not (tmp_path / "misspelled").exists()
    (tmp_path / "misspelled").mkdir()
    models.probe()


def test_the_address_of_a_server_is_no_root_and_the_message_says_where_it_goes() -> None:
    with pytest.raises(UsageError, match=r"http://minio:9000/models: unknown scheme.* its address in AWS_ENDPOINT_URL"):
        Registry("http://minio:9000/models")
    with pytest.raises(UsageError) as refusal:
        Registry("http://user:secret@minio:9000/models")
    assert "secret" not in str(refusal.value)


def test_an_id_of_a_request_that_is_none_damages_no_audit_trail(models: Registry) -> None:
    second = small_versions.publish(models.store, 2)
    with pytest.raises(UsageError, match="expected 12 to 64 hexadecimal digits"):
        models.promote(LINE, models.versions(LINE)[0], reason="x", request_id="monday")
    assert models.list(LINE).aliases["production"].version == second.version
    assert audit.history(models.store, LINE)[1] == []


def test_arguments_mean_what_they_mean_to_the_command(
    models: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for call in (lambda: models.pull(REFERENCE, ""), lambda: models.export(REFERENCE, "gguf-q8_0", "")):
        with pytest.raises(UsageError, match="expected a path, found an empty text"):
            call()
    assert not list(Path().iterdir())
    for days in (29, -1):
        with pytest.raises(UsageError, match="expected 30 at least"):
            models.gc(run_days=days)


def test_a_publishers_key_is_a_file_or_a_fingerprint(tmp_path: Path) -> None:
    models = Registry(tmp_path / "store")
    keyring = key_admin.create(models.store, [LINE])
    small_versions.publish(models.store, 1)
    public = key_admin.public_key(keyring, f"publish-{LINE}")
    pem = tmp_path / "publisher.pem"
    pem.write_text(keys.as_pem(public.key))
    for key in (str(pem), keys.fingerprint(public.key)):
        assert models.pull(REFERENCE, tmp_path / "model", verify_key=key).line == LINE
    with pytest.raises(UsageError, match="expected 64 hex digits, or a file"):
        models.pull(REFERENCE, tmp_path / "model", verify_key="nope")


def test_a_type_checker_of_another_project_takes_the_types() -> None:
    assert (resources.files("qlora_retrain") / "py.typed").is_file()
