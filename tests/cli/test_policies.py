"""The verbs that print what roles and pods may do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from qlora_retrain.cli import main
from qlora_retrain.config.line import load
from qlora_retrain.pipeline import access, policies

ROOT = "s3://my-bucket/qlora"
PROFILE = Path(__file__).resolve().parents[2] / "manifests" / "profiles" / "gpu.yaml"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main.main([str(a) for a in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_one_role_is_a_policy_that_can_be_handed_on_and_several_are_named(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("policy", line, "--root", ROOT, "--role", "train_qlora") == 0
    expected = policies.role_policy(load(line), "train_qlora", ROOT)
    assert json.loads(capsys.readouterr().out) == expected
    assert run("policy", line, "--root", ROOT) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == [*access.roles("intents")]
    assert printed["train_qlora"] == expected
    assert run("policy", line, "--root", ROOT, "--bucket") == 0
    assert json.loads(capsys.readouterr().out) == policies.bucket_policy(ROOT)


def test_policies_are_written_to_a_folder_one_file_a_role(line: Path, tmp_path: Path) -> None:
    assert run("policy", line, "--root", ROOT, "--to", tmp_path / "roles", "--role", "gc", "--role", "pull") == 0
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / "roles").iterdir()}
    assert written == {f"{role}.json": policies.role_policy(load(line), role, ROOT) for role in ("gc", "pull")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", ROOT, "--kms", "arn:aws:kms:eu-west-1:1:key/1"], "one key for planner, validate_data"),
        (["--root", ROOT, "--role", "publish"], "publish-intents"),
        (["--root", "file:///srv/store"], "expected s3://bucket/prefix"),
    ],
)
def test_what_has_no_policy_is_refused_with_what_to_write(
    line: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run("policy", line, *arguments) == 12
    assert message in capsys.readouterr().err


def test_a_profiles_egress_is_printed_as_kubernetes_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("egress", PROFILE) == 0
    (policy,) = yaml.safe_load_all(capsys.readouterr().out)
    assert (policy["kind"], policy["metadata"]["name"]) == ("NetworkPolicy", "egress-store")


def test_the_policy_of_messages_is_printed_alone_and_without_the_section_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("messages: {service_account: tell, egress: [{name: ops, blocks: [192.0.2.20/32]}]}\n")
    assert run("egress", profile, "--messages") == 0
    (policy,) = yaml.safe_load_all(capsys.readouterr().out)
    assert policy["metadata"] == {"name": "qlora-retrain-messages", "namespace": "airflow"}

    profile.write_text("messages: {service_account: tell, egress: []}\n")
    assert run("egress", profile, "--messages") == 12
    assert "messages.egress" in capsys.readouterr().err
    assert run("egress", PROFILE, "--messages") == 12
    assert "has no section messages" in capsys.readouterr().err
