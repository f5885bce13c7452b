"""What a container gets of the machine that starts it: settings and files, never a secret's value."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_retrain.config.sections import RuntimeConfig, TrainConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes.docker import container_spec

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "AIRFLOW_CONN_AWS_DEFAULT")


@pytest.fixture(autouse=True)
def no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*container_spec.PASSED_ON, *container_spec.FILES):
        monkeypatch.delenv(name, raising=False)


def test_settings_are_passed_on_and_secrets_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    for name in SECRETS:
        monkeypatch.setenv(name, "canary")
    told = container_spec.environment(RuntimeConfig(), [])
    assert told == {"AWS_REGION": "eu-west-1", "QLORA_RETRAIN_CACHE": f"{container_spec.WORK}/cache"}


@pytest.mark.parametrize("name", container_spec.FILES)
def test_a_file_that_a_variable_names_is_mounted_read_only_and_named_where_it_is_then(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, str(tmp_path / "file"))
    ((outside, inside, read_only),) = container_spec.mounts("s3://models/x", [])
    assert (outside, read_only) == (str(tmp_path / "file"), True)
    assert container_spec.environment(RuntimeConfig(), [])[name] == inside


def test_sources_are_read_only_and_a_store_in_a_folder_is_not(tmp_path: Path) -> None:
    sources = [(tmp_path / "b").as_uri(), (tmp_path / "a").as_uri(), "s3://data/x", (tmp_path / "a").as_uri()]
    found = container_spec.mounts((tmp_path / "store").as_uri(), sources)
    here = str(tmp_path)
    assert found == [
        (f"{here}/a", f"{here}/a", True),
        (f"{here}/b", f"{here}/b", True),
        (f"{here}/store",) * 2 + (False,),
    ]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9000", "http://localhost:9000", "http://[::1]:9000"])
def test_a_store_on_loopback_needs_the_hosts_network(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    with pytest.raises(UsageError, match=r"set runtime\.network: host"):
        container_spec.environment(RuntimeConfig(), ["file:///store", "s3://data/tickets"])
    assert container_spec.environment(RuntimeConfig(network="host"), ["s3://models/x"])["AWS_ENDPOINT_URL_S3"] == url
    assert container_spec.environment(RuntimeConfig(network="none"), ["file:///store"])["AWS_ENDPOINT_URL_S3"] == url


def test_one_users_work_is_not_on_anothers_volume() -> None:
    assert container_spec.volume(None) == "qlora-retrain-work"
    assert container_spec.volume("1000:100") == "qlora-retrain-work-1000"


def test_a_container_gets_a_gpu_for_each_process_where_the_plan_says_cuda() -> None:
    train, evaluate, merge = (graph.step(name) for name in ("train_qlora", "evaluate", "merge_adapter"))
    assert container_spec.gpus(train, TrainConfig(device="cuda", processes=4).model_dump()) == 4
    assert container_spec.gpus(train, TrainConfig(device="cpu", processes=4).model_dump()) == 0
    assert container_spec.gpus(evaluate, {"device": "cuda"}) == 1
    assert container_spec.gpus(merge, {"device": "cuda"}) == 0


def test_every_container_is_confined() -> None:
    found = container_spec.confinement(RuntimeConfig(memory_gib=2, cpus=1.5, pids=99))
    assert (found["read_only"], found["cap_drop"], found["privileged"]) == (True, ["ALL"], False)
    assert found["security_opt"] == ["no-new-privileges"], "and no seccomp=unconfined"
    assert (found["mem_limit"], found["nano_cpus"], found["pids_limit"]) == (2**31, 1_500_000_000, 99)
