"""What a container gets from the machine that starts it: settings and files, never the value of a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.source_access import SourceAccess
from qlora_retrain.pipeline import access
from qlora_retrain.runtimes.docker import container_spec
from qlora_retrain.storage import open_store
from qlora_retrain.storage.local import LOCK_FILE

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "AIRFLOW_CONN_AWS_DEFAULT")


@pytest.fixture(autouse=True)
def no_aws_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove this machine's own AWS settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (*container_spec.FORWARDED_VARIABLES, *container_spec.CREDENTIAL_FILE_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def test_settings_are_passed_on_and_secrets_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    for name in SECRETS:
        monkeypatch.setenv(name, "canary")
    variables = container_spec.environment(RuntimeConfig(), [])
    assert variables == {"AWS_REGION": "eu-west-1", "QLORA_RETRAIN_CACHE": f"{container_spec.WORK_DIR}/cache"}


@pytest.mark.parametrize(
    "name",
    ["AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"],
)
def test_a_container_speaks_to_s3_as_the_worker_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "as set")
    assert container_spec.environment(RuntimeConfig(), [])[name] == "as set"


@pytest.mark.parametrize("name", container_spec.CREDENTIAL_FILE_VARIABLES)
def test_a_file_that_a_variable_names_is_mounted_read_only_and_the_variable_names_its_new_path(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, str(tmp_path / "file"))
    ((host_path, container_path, read_only),) = container_spec.bind_mounts("s3://models/x", [])
    assert (host_path, read_only) == (str(tmp_path / "file"), True)
    assert container_spec.environment(RuntimeConfig(), [])[name] == container_path


def test_the_settings_of_boto3_in_the_home_folder_count_in_a_container_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text("[default]\nrequest_checksum_calculation = when_required\n")
    ((host_path, container_path, read_only),) = container_spec.bind_mounts("s3://models/x", [])
    assert (host_path, read_only) == (str(tmp_path / ".aws" / "config"), True)
    assert container_spec.environment(RuntimeConfig(), [])["AWS_CONFIG_FILE"] == container_path

    # A variable that names another file is heeded first, as by boto3.
    monkeypatch.setenv("AWS_CONFIG_FILE", "/etc/aws")
    assert [path for path, _, _ in container_spec.bind_mounts("s3://models/x", [])] == ["/etc/aws"]


def test_a_file_that_a_link_leads_to_is_mounted_where_it_lies(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "0123", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "own.json").write_text("{}")
    (snapshot / "linked").symlink_to(blobs)
    names = ["config.json", "own.json", "gone.json", "linked/hash"]

    uris = container_spec.mounted_uris(snapshot, names, SourceAccess(((tmp_path / "cache").as_uri(),)))
    mounts = container_spec.bind_mounts("s3://models/x", uris)
    assert mounts == [(str(path), str(path), True) for path in (blobs / "hash", snapshot)]
    with pytest.raises(UsageError, match="not below an allowed source"):
        container_spec.mounted_uris(snapshot, names, SourceAccess((snapshot.as_uri(),)))


def test_a_single_file_that_is_allowed_brings_no_neighbours_into_a_container(tmp_path: Path) -> None:
    for name in ("a.jsonl", "private.jsonl"):
        (tmp_path / name).write_text("{}")
    access = SourceAccess(((tmp_path / "a.jsonl").as_uri(),))
    uris = container_spec.mounted_uris(tmp_path, ["a.jsonl"], access)
    assert container_spec.bind_mounts("s3://models/x", uris) == [(f"{tmp_path}/a.jsonl",) * 2 + (True,)]


def test_sources_are_read_only_and_a_store_in_a_folder_is_not(tmp_path: Path) -> None:
    sources = [(tmp_path / "b").as_uri(), (tmp_path / "a").as_uri(), "s3://data/x", (tmp_path / "a").as_uri()]
    mounts = container_spec.bind_mounts((tmp_path / "store").as_uri(), sources)
    folder = str(tmp_path)
    assert mounts == [
        (f"{folder}/a", f"{folder}/a", True),
        (f"{folder}/b", f"{folder}/b", True),
        (f"{folder}/store",) * 2 + (False,),
    ]


def test_of_a_store_in_a_folder_a_container_writes_what_its_step_writes_and_the_lock(tmp_path: Path) -> None:
    root, store = tmp_path.as_uri(), str(tmp_path)
    folders = access.write_folders(graph.step("train_qlora"), "tickets", "run-1")
    paths = container_spec.make_writable_paths(root, folders, LOCK_FILE)
    mounts = container_spec.bind_mounts(root, [], writable=paths)
    # The store first, since an engine mounts the others on top of it.
    assert mounts[0] == (store, store, True)
    written = {
        f"{store}/{path}"
        for path in (
            "artifacts/adapter",
            "scratch/train_qlora",
            "runs/run-1/logs",
            "runs/run-1/status",
            "runs/run-1/endings",
            ".store-lock",
        )
    }
    assert {host for host, _, _ in mounts[1:]} == written
    assert not any(read_only for _, _, read_only in mounts[1:])
    assert all(Path(path).exists() for path in written)
    assert not Path(store, "models").exists()

    publish = access.write_folders(graph.step("publish"), "tickets", "run-1")
    assert "models/tickets" in publish
    assert not {"models", "artifacts", "artifacts/evaluation", "artifacts/model", "runs/run-1"} & set(publish)
    # A file of the store's that is written under a lock works in a store that was prepared so.
    local = open_store(root)
    tag = local.write_if_absent("artifacts/adapter/x", b"1")
    assert local.swap("artifacts/adapter/x", b"2", tag)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9000", "http://localhost:9000", "http://[::1]:9000"])
def test_a_store_on_loopback_needs_the_hosts_network(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    with pytest.raises(UsageError, match=r"set runtime\.network: host"):
        container_spec.environment(RuntimeConfig(), ["file:///store", "s3://data/tickets"])
    assert container_spec.environment(RuntimeConfig(network="host"), ["s3://models/x"])["AWS_ENDPOINT_URL_S3"] == url
    assert container_spec.environment(RuntimeConfig(network="none"), ["file:///store"])["AWS_ENDPOINT_URL_S3"] == url


def test_one_users_work_is_not_on_anothers_volume() -> None:
    assert container_spec.work_volume_name(None) == "qlora-retrain-work"
    assert container_spec.work_volume_name("1000:100") == "qlora-retrain-work-1000"


def test_a_container_gets_a_gpu_for_each_process_where_the_plan_says_cuda() -> None:
    train, evaluate, merge = (graph.step(name) for name in ("train_qlora", "evaluate", "merge_adapter"))
    assert container_spec.gpu_count(train, TrainConfig(device="cuda", num_processes=4).model_dump()) == 4
    assert container_spec.gpu_count(train, TrainConfig(device="cpu", num_processes=4).model_dump()) == 0
    assert container_spec.gpu_count(evaluate, {"device": "cuda"}) == 1
    assert container_spec.gpu_count(merge, {"device": "cuda"}) == 0


def test_every_container_is_confined() -> None:
    options = container_spec.host_config_options(RuntimeConfig(memory_gib=2, cpus=1.5, pids=99))
    assert (options["read_only"], options["cap_drop"], options["privileged"]) == (True, ["ALL"], False)
    assert options["security_opt"] == ["no-new-privileges"], "and no seccomp=unconfined"
    assert (options["mem_limit"], options["nano_cpus"], options["pids_limit"]) == (2**31, 1_500_000_000, 99)
