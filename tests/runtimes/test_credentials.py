"""A step on this machine has its own role's credentials alone, where there is a folder of them."""

from __future__ import annotations

from pathlib import Path

import boto3.session
import pytest

from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline import access
from qlora_retrain.runtimes import credentials
from qlora_retrain.runtimes.docker import container_spec

TRAIN, PUBLISH = graph.step("train_qlora"), graph.step("publish")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for role in ("train_qlora", "publish-tickets"):
        text = f"[default]\naws_access_key_id = key-of-{role}\naws_secret_access_key = s\n"
        (tmp_path / role).write_text(text)
    return tmp_path


def test_without_a_folder_a_step_has_the_environment_as_it_is() -> None:
    environment = {"AWS_ACCESS_KEY_ID": "a", "AWS_SHARED_CREDENTIALS_FILE": "/f", "X": "1"}
    assert credentials.step_environment(environment, TRAIN, "tickets") == environment


@pytest.mark.parametrize("step", [TRAIN, PUBLISH], ids=lambda step: step.name)
def test_a_step_has_its_roles_key_and_nothing_stronger_or_of_others(
    folder: Path, step: graph.Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    stronger = {"AWS_ACCESS_KEY_ID": "of-the-worker", "AWS_SECRET_ACCESS_KEY": "w", "AWS_SESSION_TOKEN": "w"}
    roles = {"AWS_ROLE_ARN": "arn:aws:iam::1:role/w", "AWS_WEB_IDENTITY_TOKEN_FILE": "/w"}
    environment = {**stronger, **roles, "QLORA_RETRAIN_CREDENTIALS": str(folder), "AWS_DEFAULT_REGION": "eu-west-1"}
    result = credentials.step_environment(environment, step, "tickets")
    assert set(result) == {"AWS_SHARED_CREDENTIALS_FILE", "AWS_DEFAULT_REGION"}

    # What boto3 makes of it.
    for name in environment:
        monkeypatch.delenv(name, raising=False)
    for name, value in result.items():
        monkeypatch.setenv(name, value)
    key = boto3.session.Session().get_credentials().access_key
    assert key == f"key-of-{step.name}" + ("-tickets" if step is PUBLISH else "")


def test_a_role_without_a_file_is_refused_and_never_runs_with_the_workers_credentials(folder: Path) -> None:
    environment = {"QLORA_RETRAIN_CREDENTIALS": str(folder)}
    with pytest.raises(UsageError, match=r"publish-mails is not there"):
        credentials.step_environment(environment, PUBLISH, "mails")


@pytest.mark.parametrize(
    "setting",
    [
        "[default]\naws_access_key_id = w\naws_secret_access_key = w",
        "[profile worker]\ncredential_process = /bin/w",
        "[default]\nrole_arn = x\nCredential_Source=Ec2InstanceMetadata",
        "[sso-session w]\nsso_region = x",
    ],
)
@pytest.mark.parametrize("is_default", [True, False])
def test_credentials_in_awss_file_of_settings_are_no_way_round_the_role(
    folder: Path, tmp_path: Path, setting: str, is_default: bool
) -> None:
    path = tmp_path / ".aws" / "config"
    path.parent.mkdir()
    path.write_text(f"[default]\nregion = eu-west-1\n{setting}\n")
    place = {"HOME": str(tmp_path)} if is_default else {"HOME": "/nowhere", "AWS_CONFIG_FILE": str(path)}
    environment = {"QLORA_RETRAIN_CREDENTIALS": str(folder), "AWS_PROFILE": "worker", **place}
    with pytest.raises(UsageError, match="gives credentials that every step could take"):
        credentials.step_environment(environment, TRAIN, "tickets")
    path.write_text("[default]\nregion = eu-west-1\nrole_arn = x\nsource_profile = default\n")
    assert credentials.step_environment(environment, TRAIN, "tickets")


def test_a_container_sees_its_own_steps_file_alone(folder: Path) -> None:
    environment = {"QLORA_RETRAIN_CREDENTIALS": str(folder), "AWS_CONFIG_FILE": "/etc/aws", "AWS_ROLE_ARN": "w"}
    settings = credentials.step_environment(environment, TRAIN, "tickets")
    mounts = container_spec.bind_mounts("s3://models/x", [], settings)
    assert {(host, read_only) for host, _, read_only in mounts} == {("/etc/aws", True), (f"{folder}/train_qlora", True)}
    variables = container_spec.environment(RuntimeConfig(), [], settings)
    target = {host: container for host, container, _ in mounts}[f"{folder}/train_qlora"]
    assert variables["AWS_SHARED_CREDENTIALS_FILE"] == target
    assert "AWS_ROLE_ARN" not in variables


def test_a_consumer_has_the_role_that_pulls_alone(folder: Path) -> None:
    environment = {"QLORA_RETRAIN_CREDENTIALS": str(folder), "AWS_ACCESS_KEY_ID": "of-the-worker"}
    with pytest.raises(UsageError, match="pull is not there"):
        credentials.role_environment(environment, access.PULL)
    (folder / "pull").write_text("[default]\n")
    assert credentials.role_environment(environment, access.PULL) == {
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "pull")
    }
