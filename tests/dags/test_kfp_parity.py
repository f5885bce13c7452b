"""The compiled Kubeflow pipeline equals the graph and the Airflow DAG, and its pods are what the profile says."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from qlora_retrain.cli import main
from qlora_retrain.core import graph
from qlora_retrain.core.errors import Exit
from qlora_retrain.runtimes.docker import container_spec

if TYPE_CHECKING:
    from tests.dags.conftest import Compiled

pytestmark = pytest.mark.kfp

PROJECT = Path(__file__).resolve().parents[2]
LIGHT, TRAIN = "registry.example:5000/light:7", "train@sha256:" + "0" * 64
EVERY_TASK = (graph.PLAN_TASK, "summary", *(s.name for s in graph.STEPS))
InKfp = Callable[..., subprocess.CompletedProcess[str]]


def kfp_name(name: str) -> str:
    return name.replace("_", "-")


def kfp_edges(compiled: Compiled) -> set[tuple[str, str]]:
    """(upstream, downstream) by the names that the UI shows, which are the graph's."""
    shown = {key: task["taskInfo"]["name"] for key, task in compiled.steps.items()}
    return {(shown[up], shown[key]) for key, task in compiled.steps.items() for up in task.get("dependentTasks", ())}


def closure(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Every pair of which the first runs before the second."""
    while more := {(a, d) for a, b in edges for c, d in edges if b == c} - edges:
        edges = edges | more
    return edges


def test_the_package_is_one_that_kfp_itself_accepts(compiled: Compiled, in_kfp: InKfp, tmp_path: Path) -> None:
    (tmp_path / "retrain.yaml").write_text(compiled.text)
    program = (
        "import sys\nfrom kfp import components\nfrom kfp.pipeline_spec import pipeline_spec_pb2\n"
        "from google.protobuf import json_format\nimport yaml\n"
        "made = components.load_component_from_file(sys.argv[1])\n"
        "spec = json_format.ParseDict(next(yaml.safe_load_all(open(sys.argv[1]))), pipeline_spec_pb2.PipelineSpec())\n"
        "assert made.pipeline_spec == spec\nprint(made.name, sorted(made.component_spec.inputs))"
    )
    done = in_kfp("-c", program, tmp_path / "retrain.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "retrain ['line', 'overrides', 'plan_uri', 'root']"


def test_the_tasks_are_the_plan_and_the_graphs_steps_under_an_exit_handler(compiled: Compiled) -> None:
    names = {graph.PLAN_TASK, *(s.name for s in graph.STEPS)}
    assert set(compiled.steps) == {kfp_name(n) for n in names}
    assert {task["taskInfo"]["name"] for task in compiled.steps.values()} == names
    last = compiled.tasks["summary"]
    assert last["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert last["dependentTasks"] == ["exit-handler-1"]
    assert last["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}


def test_the_edges_are_the_graphs_and_the_plan_comes_before_every_step(compiled: Compiled) -> None:
    assert kfp_edges(compiled) == set(graph.edges()) | {(graph.PLAN_TASK, s.name) for s in graph.STEPS}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
def test_kubeflow_and_airflow_run_the_same_tasks_in_the_same_order_with_the_same_retries(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.dag_processing.dagbag import DagBag

    line = yaml.safe_load((PROJECT / "pipelines" / "support-intents.yaml").read_text())
    line["runtime"] = {"kind": "docker", "light_image": LIGHT, "train_image": TRAIN}
    (tmp_path / "line.yaml").write_text(yaml.safe_dump(line))
    monkeypatch.setenv("QLORA_RETRAIN_PIPELINES", str(tmp_path))
    bag = DagBag(str(PROJECT / "dags"))
    assert bag.import_errors == {}  # so Airflow ignores retrain_kfp.py, which it could not import
    dag = bag.dags[line["line"]]
    airflow = {(up, task.task_id) for task in dag.tasks for up in task.upstream_task_ids}
    kubeflow = kfp_edges(compiled)

    def between_steps(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
        return {edge for edge in edges if graph.PLAN_TASK not in edge}

    assert between_steps(kubeflow) == between_steps(airflow)
    # Every KFP step names the plan, whose output it takes; Airflow's name it where nothing else comes before.
    assert closure(kubeflow) == closure(airflow)
    for task in dag.tasks:
        mine = compiled.tasks[kfp_name(task.task_id)]
        assert mine["retryPolicy"]["maxRetryCount"] == task.retries, task.task_id
        if task.task_id == graph.PLAN_TASK:
            continue  # Airflow plans in its own process
        runs = compiled.container(task.task_id)
        assert runs["image"] == task.image
        plan_uri = "{{$.inputs.parameters['plan_uri']}}"
        assert runs["command"][:5] == container_spec.command(task.task_id, plan_uri), (
            "and what KFP alone is told after it"
        )


@pytest.mark.parametrize("step", graph.STEPS, ids=lambda s: s.name)
def test_a_step_is_the_one_command_in_its_image_and_hands_over_its_report_and_numbers(
    compiled: Compiled, step: graph.Step
) -> None:
    runs, task = compiled.container(step.name), compiled.tasks[kfp_name(step.name)]
    command = ["python", "-m", f"components.{step.name}", "--plan", "{{$.inputs.parameters['plan_uri']}}"]
    command += ["--executor-input", "{{$}}"]
    outputs = {"numbers": "system.Metrics"}
    if step.report:
        command += ["--report-to", "{{$.outputs.artifacts['report'].path}}"]
        outputs["report"] = "system.HTML"
    assert runs["command"] == command
    assert task["inputs"]["parameters"] == {
        "plan_uri": {"taskOutputParameter": {"producerTask": "plan", "outputParameterKey": "uri"}}
    }
    made = compiled.component(step.name)["outputDefinitions"]["artifacts"]
    assert {name: kind["artifactType"]["schemaTitle"] for name, kind in made.items()} == outputs
    assert runs["image"] == {"light": LIGHT, "train": TRAIN}[step.image]
    assert task["retryPolicy"]["maxRetryCount"] == step.retries


@pytest.mark.parametrize("name", EVERY_TASK)
def test_a_pod_is_what_the_profile_says(compiled: Compiled, name: str) -> None:
    step = graph.step(name) if name not in (graph.PLAN_TASK, "summary") else None
    kind = "gpu" if step and step.gpus else step.image if step else "light"
    runs, pod = compiled.container(name), compiled.pod(name)
    cpus, memory = {"light": ("0.5", "2Gi"), "train": ("4", "32Gi"), "gpu": ("8", "64Gi")}[kind]
    asked: dict[str, Any] = {"resourceCpuRequest": cpus, "resourceMemoryRequest": memory, "resourceMemoryLimit": memory}
    if kind == "gpu":
        gpus = "2" if name == "train_qlora" else "1"
        asked["accelerator"] = {"resourceType": "nvidia.com/gpu", "resourceCount": gpus}
    found = {k: v for k, v in runs["resources"].items() if k.startswith("resource")}
    if "accelerator" in runs["resources"]:
        accelerator = runs["resources"]["accelerator"]
        found["accelerator"] = {k: v for k, v in accelerator.items() if k.startswith("resource")}
    assert found == asked
    assert {item["name"]: item["value"] for item in runs["env"]} == {
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_SHARED_CREDENTIALS_FILE": "/run/secrets/aws/credentials",
        "QLORA_RETRAIN_IMAGE": TRAIN if kind != "light" else LIGHT,
        "QLORA_RETRAIN_CACHE": f"{container_spec.WORK}/cache",
    }
    assert pod["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
    shared = [("/dev/shm", "1024Mi")] if name == "train_qlora" else []  # NCCL's, between the GPUs of a pod
    assert [(m["mountPath"], m["sizeLimit"]) for m in pod["emptyDirMounts"]] == [(container_spec.WORK, "50Gi"), *shared]
    assert [(s["secretName"], s["mountPath"]) for s in pod["secretAsVolume"]] == [
        ("store-credentials", "/run/secrets/aws")
    ]
    assert "secretAsEnv" not in pod
    assert [s["secretName"] for s in pod["imagePullSecret"]] == ["registry"]
    if kind == "gpu":
        assert pod["nodeSelector"] == {"labels": {"gpu": "h100"}}
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    else:
        assert not {"nodeSelector", "tolerations"} & set(pod)


def test_kfp_caches_nothing_since_the_stores_keys_do(compiled: Compiled) -> None:
    assert not any(task["cachingOptions"].get("enableCache") for task in compiled.tasks.values())


def test_only_a_line_and_a_store_must_be_given_to_a_run(compiled: Compiled) -> None:
    parameters = compiled.pipeline["root"]["inputDefinitions"]["parameters"]
    assert {n for n, p in parameters.items() if not p.get("isOptional")} == {"line", "root"}
    assert {n: p["defaultValue"] for n, p in parameters.items() if p.get("isOptional")} == {
        "plan_uri": "",
        "overrides": [],
    }


def test_where_kfp_is_not_installed_the_command_says_which_environment_has_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["kfp", "compile"])
    assert ended.value.code == Exit.USAGE
    assert "run it with .venv-kfp/bin/qlora-retrain" in capsys.readouterr().err


@pytest.mark.parametrize("image", ["train", "train:latest", "registry.example:5000/train"])
def test_an_image_whose_name_can_move_is_refused(image: str, in_kfp: InKfp, tmp_path: Path) -> None:
    out = tmp_path / "retrain.yaml"
    done = in_kfp("-m", "qlora_retrain.cli", "kfp", "compile", "--out", out, "--train-image", image)
    assert (done.returncode, out.exists()) == (Exit.USAGE, False)
    assert image in done.stderr
