"""A cluster's profile: what it refuses, and what a step's pod gets of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_retrain.config.cluster_profile import ClusterProfile, load, quantity
from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError

EXAMPLE = Path(__file__).resolve().parents[2] / "manifests" / "profiles" / "gpu.yaml"


def refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load(path)
    return str(caught.value)


def test_the_profile_to_start_from_is_valid_and_asks_for_gpus_where_the_graph_does() -> None:
    profile = load(EXAMPLE)
    asks = {step.name: (profile.gpus(step), profile.pod(step).memory_gib) for step in graph.STEPS}
    assert asks["train_qlora"] == (1, 64)
    assert asks["merge_adapter"] == (0, 32)
    assert asks["publish"] == (0, 8)


def test_the_training_pod_alone_gets_a_gpu_for_each_process() -> None:
    profile = load(EXAMPLE).model_copy(update={"train_gpus": 4})
    assert {step.name: profile.gpus(step) for step in graph.STEPS if profile.gpus(step)} == {
        "train_qlora": 4,
        "evaluate": 1,
    }


def test_a_cluster_without_gpus_asks_for_none() -> None:
    profile = load(EXAMPLE).model_copy(update={"gpu_resource": None})
    train = graph.step("train_qlora")
    assert (profile.gpus(train), profile.pod(train)) == (0, profile.train)


def test_every_error_comes_at_once_with_its_line_and_the_near_match(tmp_path: Path) -> None:
    message = refusal(
        tmp_path, "light_image: train\ngpu:\n  tolerations:\n    - {key: a, efect: NoSchedule}\ndisk_gb: 5\n"
    )
    assert "cluster.yaml:1: light_image: image 'train': expected a tag" in message
    assert "cluster.yaml:4: gpu.tolerations.0.efect: unknown field; did you mean effect?" in message
    assert "cluster.yaml:5: disk_gb: unknown field; did you mean disk_gib?" in message


@pytest.mark.parametrize(
    "variable",
    [
        "AWS_SECRET_ACCESS_KEY: canary-1",
        "AWS_SESSION_TOKEN: canary-1",
        "AWS_ENDPOINT_URL: http://a:canary-1@b",
        "AWS_ENDPOINT_URL: http://a:90/canary-1@b",
    ],
)
def test_a_secret_in_a_variable_is_refused_and_not_repeated(tmp_path: Path, variable: str) -> None:
    message = refusal(tmp_path, f"env: {{'{variable.replace(': ', chr(39) + ': ' + chr(39), 1)}'}}\n")
    assert "cluster.yaml:1: env" in message
    assert "canary-1" not in message


def test_files_with_credentials_and_a_store_of_ones_own_may_be_named() -> None:
    env = {
        "AWS_SHARED_CREDENTIALS_FILE": "/run/secrets/aws",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/run/secrets/token",
        "HF_TOKEN_PATH": "/run/secrets/hf/token",
        "AWS_ENDPOINT_URL": "http://minio.storage:9000",
    }
    assert ClusterProfile(env=env).env == env


@pytest.mark.parametrize(
    ("field", "accepted", "refused"),
    [
        ("namespace", ["a", "ml-team", "x" * 63], ["a.b", "-a", "x" * 64]),
        ("priority_class", ["high.gpu", "x" * 100], ["a..b", "a.-b", "high_gpu", "x" * 254]),
        ("gpu_resource", ["nvidia.com/gpu", "amd.com/gpu"], ["nvidia/com/gpu", "nvidia.com/", "/gpu"]),
    ],
)
def test_names_are_those_that_the_cluster_takes(field: str, accepted: list[str], refused: list[str]) -> None:
    for name in accepted:
        assert getattr(ClusterProfile.model_validate({field: name}), field) == name
    for name in refused:
        with pytest.raises(ValueError, match=field):
            ClusterProfile.model_validate({field: name})


@pytest.mark.parametrize("label", [{"pool": "gpu "}, {"pool": "x" * 64}, {"a/b/c": "x"}, {"pool-": "x"}, {"": "x"}])
def test_a_node_label_that_no_node_can_have_is_refused(label: dict[str, str]) -> None:
    ClusterProfile.model_validate({"gpu": {"node_selector": {"cloud.example.com/pool": "A100_80", "empty": ""}}})
    with pytest.raises(ValueError, match="node_selector"):
        ClusterProfile.model_validate({"gpu": {"node_selector": label}})


@pytest.mark.parametrize(
    ("gib", "written"), [(8, "8Gi"), (8.0, "8Gi"), (3.5, "3584Mi"), (0.2, "205Mi"), (65_538, "65538Gi")]
)
def test_an_amount_is_written_in_whole_units(gib: float, written: str) -> None:
    assert quantity(gib) == written
