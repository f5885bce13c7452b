"""Who the audit trail says it was: the kernel's user or STS's caller, and what an orchestrator says, marked as such."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path
from typing import Any

import boto3.session
import pytest

from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage import actor, open_store
from qlora_retrain.storage.store import Store


@pytest.fixture(autouse=True)
def no_orchestrator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "_orchestrator", "")
    monkeypatch.setattr(actor, "_run_reason", "")


@pytest.fixture
def own_user() -> str:
    return f"os:{pwd.getpwuid(os.geteuid()).pw_name}@{socket.gethostname()}"


def test_a_store_in_a_folder_has_the_kernels_user_and_never_asks_sts(
    tmp_path: Path, own_user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise AssertionError("STS was asked")

    monkeypatch.setattr(boto3.session, "Session", unreachable)
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME", "SUDO_USER", "AIRFLOW_CTX_DAG_OWNER"):
        monkeypatch.setenv(variable, "mallory")
    assert actor.describe(open_store(tmp_path.as_uri())) == own_user


def test_a_store_in_s3_has_the_caller_that_sts_names(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_uri)
    role = (
        boto3.session.Session()
        .client("sts")
        .assume_role(RoleArn="arn:aws:iam::123456789012:role/qlora-retrain-publish", RoleSessionName="run-7")
    )
    for name, value in role["Credentials"].items():
        variables = {
            "AccessKeyId": "ACCESS_KEY_ID",
            "SecretAccessKey": "SECRET_ACCESS_KEY",
            "SessionToken": "SESSION_TOKEN",
        }
        if name in variables:
            monkeypatch.setenv(f"AWS_{variables[name]}", value)
    expected = f"sts:{role['AssumedRoleUser']['Arn']}"
    assert expected.endswith(":assumed-role/qlora-retrain-publish/run-7")
    assert actor.describe(store) == expected
    actor.name_orchestrator("airflow:alice@example.org")
    assert actor.describe(store) == f"airflow:alice@example.org via {expected}"


def test_without_an_answer_of_sts_the_kernels_user_is_marked(
    s3_uri: str, own_user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Store = open_store(s3_uri)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{probe.getsockname()[1]}")
        assert actor.describe(store) == f"{own_user} (STS did not say: EndpointConnectionError)"


@pytest.mark.parametrize(
    "text",
    ["alice", "airflow:", "airflow:alice via sts:arn:aws:sts::1:root", "airflow:a\nb", "sts", "Airflow:x", "a:\x1b[2J"],
)
def test_an_orchestrators_word_cannot_pass_for_what_is_proved(text: str) -> None:
    with pytest.raises(UsageError, match="expected SYSTEM:NAME"):
        actor.name_orchestrator(text)


def test_what_a_person_says_of_a_run_stands_behind_the_programs_reason() -> None:
    assert actor.with_run_reason("passed both gates") == "passed both gates"
    actor.state_run_reason("new labels; by alice")
    assert actor.with_run_reason("passed both gates") == "passed both gates; the run's reason: new labels; by alice"


@pytest.mark.parametrize("text", ["x" * 501, "a\nb", "a\x1b[2J", "a\u202eb", "\0"])
def test_a_reason_that_could_rewrite_a_line_of_the_trail_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected one line of at most 500 printable characters"):
        actor.state_run_reason(text)
