"""The compiled Kubeflow pipeline equals the graph and the Airflow DAG, and its pods get what the profile says."""

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
    from tests.dags.conftest import CompiledPipeline

pytestmark = pytest.mark.kfp

PROJECT = Path(__file__).resolve().parents[2]
LIGHT, TRAIN = "registry.example:5000/light:7", "train@sha256:" + "0" * 64
EVERY_TASK = (graph.PLAN_TASK, "summary", *(s.name for s in graph.STEPS))
RunInKfp = Callable[..., subprocess.CompletedProcess[str]]


def kfp_name(name: str) -> str:
    return name.replace("_", "-")


def kfp_edges(compiled: CompiledPipeline) -> set[tuple[str, str]]:
    """Return the (upstream, downstream) pairs by the names that the UI shows, which are the graph's."""
    display_names = {key: task["taskInfo"]["name"] for key, task in compiled.steps.items()}
    return {
        (display_names[up], display_names[key])
        for key, task in compiled.steps.items()
        for up in task.get("dependentTasks", ())
    }


def transitive_closure(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Add every pair of which the first runs before the second through other tasks."""
    while indirect := {(a, d) for a, b in edges for c, d in edges if b == c} - edges:
        edges = edges | indirect
    return edges


def test_the_package_is_one_that_kfp_itself_accepts(
    compiled: CompiledPipeline, in_kfp: RunInKfp, tmp_path: Path
) -> None:
    (tmp_path / "retrain.yaml").write_text(compiled.text)
    program = (
        "import sys\nfrom kfp import components\nfrom kfp.pipeline_spec import pipeline_spec_pb2\n"
        "from google.protobuf import json_format\nimport yaml\n"
        "made = components.load_component_from_file(sys.argv[1])\n"
        "spec = json_format.ParseDict(next(yaml.safe_load_all(open(sys.argv[1]))), pipeline_spec_pb2.PipelineSpec())\n"
        "assert made.pipeline_spec == spec\nprint(made.name, sorted(made.component_spec.inputs))"
    )
    completed = in_kfp("-c", program, tmp_path / "retrain.yaml")
    assert completed.returncode == 0, completed.stderr
    assert (
        completed.stdout.strip()
        == "retrain ['alias', 'line', 'line_name', 'overrides', 'resume_run', 'root', 'started_by']"
    )


def test_the_tasks_are_the_plan_and_the_graphs_steps_under_an_exit_handler(compiled: CompiledPipeline) -> None:
    names = {graph.PLAN_TASK, *(s.name for s in graph.STEPS)}
    assert set(compiled.steps) == {kfp_name(n) for n in names}
    assert {task["taskInfo"]["name"] for task in compiled.steps.values()} == names
    last = compiled.tasks["summary"]
    assert last["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert last["dependentTasks"] == ["exit-handler-1"]
    assert last["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}


def test_the_edges_are_the_graphs_and_the_plan_comes_before_every_step(compiled: CompiledPipeline) -> None:
    assert kfp_edges(compiled) == set(graph.edges()) | {(graph.PLAN_TASK, s.name) for s in graph.STEPS}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
def test_kubeflow_and_airflow_run_the_same_tasks_in_the_same_order_with_the_same_retries(
    compiled: CompiledPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.dag_processing.dagbag import DagBag

    line = yaml.safe_load((PROJECT / "pipelines" / "support-intents.yaml").read_text())
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "support-intents.yaml").write_text(yaml.safe_dump(line))
    runtime = {"kind": "docker", "light_image": LIGHT, "train_image": TRAIN}
    (tmp_path / "platform.yaml").write_text(yaml.safe_dump({"runtime": runtime}))
    monkeypatch.setenv("QLORA_RETRAIN_PIPELINES", str(tmp_path / "pipelines"))
    monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(tmp_path / "platform.yaml"))

    bag = DagBag(str(PROJECT / "dags"))
    assert bag.import_errors == {}  # so Airflow ignores retrain_kfp.py, which it could not import
    dag = bag.dags[line["line"]]
    airflow = {(up, task.task_id) for task in dag.tasks for up in task.upstream_task_ids}
    kubeflow = kfp_edges(compiled)

    def between_steps(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
        return {edge for edge in edges if graph.PLAN_TASK not in edge}

    assert between_steps(kubeflow) == between_steps(airflow)
    # Every KFP step depends on the plan, since it takes its output; in Airflow only a step without another upstream.
    assert transitive_closure(kubeflow) == transitive_closure(airflow)
    for task in dag.tasks:
        kfp_task = compiled.tasks[kfp_name(task.task_id)]
        assert kfp_task["retryPolicy"]["maxRetryCount"] == task.retries, task.task_id
        if task.task_id == graph.PLAN_TASK:
            continue  # Airflow plans in its own process
        container = compiled.container(task.task_id)
        assert container["image"] == task.image
        plan_uri = "{{$.inputs.parameters['plan_uri']}}"
        assert container["command"][:5] == container_spec.step_command(task.task_id, plan_uri), (
            "KFP's own arguments come after the command"
        )


@pytest.mark.parametrize("step", graph.STEPS, ids=lambda s: s.name)
def test_a_step_is_the_one_command_in_its_image_and_hands_over_its_report_and_numbers(
    compiled: CompiledPipeline, step: graph.Step
) -> None:
    container, task = compiled.container(step.name), compiled.tasks[kfp_name(step.name)]
    command = ["python", "-m", f"components.{step.name}", "--plan", "{{$.inputs.parameters['plan_uri']}}"]
    command += ["--line", "{{$.inputs.parameters['line_name']}}", "--root", "{{$.inputs.parameters['root']}}"]
    command += ["--alias", "{{$.inputs.parameters['alias']}}", "--executor-input", "{{$}}"]
    command += ["--ending-to", "{{$.outputs.parameters['ending'].output_file}}"]
    outputs = {"numbers": "system.Metrics"}
    if step.report:
        command += ["--report-to", "{{$.outputs.artifacts['report'].path}}"]
        outputs["report"] = "system.HTML"
    assert container["command"] == command
    # Of the plan's maker is the plan's place alone; the line, the store and the alias are those of the run.
    assert task["inputs"]["parameters"] == {
        "plan_uri": {"taskOutputParameter": {"producerTask": "plan", "outputParameterKey": "uri"}},
        **{name: {"componentInputParameter": f"pipelinechannel--{name}"} for name in ("line_name", "root", "alias")},
    }
    outputs_of_component = compiled.component(step.name)["outputDefinitions"]["artifacts"]
    assert {name: kind["artifactType"]["schemaTitle"] for name, kind in outputs_of_component.items()} == outputs
    assert container["image"] == {"light": LIGHT, "train": TRAIN}[step.image]
    assert task["retryPolicy"]["maxRetryCount"] == step.retries


@pytest.mark.parametrize("name", EVERY_TASK)
def test_a_pod_is_what_the_profile_says(compiled: CompiledPipeline, name: str) -> None:
    step = graph.step(name) if name not in (graph.PLAN_TASK, "summary") else None
    kind = "gpu" if step and step.gpus else step.image if step else "light"
    container, pod = compiled.container(name), compiled.pod(name)
    cpus, memory = {"light": ("0.5", "2Gi"), "train": ("4", "32Gi"), "gpu": ("8", "64Gi")}[kind]
    expected: dict[str, Any] = {
        "resourceCpuRequest": cpus,
        "resourceMemoryRequest": memory,
        "resourceMemoryLimit": memory,
    }
    if kind == "gpu":
        gpus = "2" if name == "train_qlora" else "1"
        expected["accelerator"] = {"resourceType": "nvidia.com/gpu", "resourceCount": gpus}
    resources = {k: v for k, v in container["resources"].items() if k.startswith("resource")}
    if "accelerator" in container["resources"]:
        accelerator = container["resources"]["accelerator"]
        resources["accelerator"] = {k: v for k, v in accelerator.items() if k.startswith("resource")}
    assert resources == expected
    assert {item["name"]: item["value"] for item in container["env"]} == {
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_SHARED_CREDENTIALS_FILE": "/run/secrets/aws/credentials",
        "QLORA_RETRAIN_IMAGE": TRAIN if kind != "light" else LIGHT,
        "QLORA_RETRAIN_CACHE": f"{container_spec.WORK_DIR}/cache",
    }
    assert pod["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
    shared = [("/dev/shm", "1024Mi")] if name == "train_qlora" else []  # NCCL's, between the GPUs of a pod
    assert [(m["mountPath"], m["sizeLimit"]) for m in pod["emptyDirMounts"]] == [
        (container_spec.WORK_DIR, "50Gi"),
        *shared,
    ]
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


def test_every_pod_has_a_deadline(compiled: CompiledPipeline) -> None:
    names = (graph.PLAN_TASK, "summary", *(step.name for step in graph.STEPS))
    hours = {name: int(compiled.pod(name)["activeDeadlineSeconds"]) / 3600 for name in names}
    assert hours == {name: 168 + 2 if name == "train_qlora" else 24 for name in names}


def test_kfp_caches_nothing_since_the_stores_keys_do(compiled: CompiledPipeline) -> None:
    assert not any(task["cachingOptions"].get("enableCache") for task in compiled.tasks.values())


def test_only_a_line_its_name_and_a_store_must_be_given_to_a_run(compiled: CompiledPipeline) -> None:
    parameters = compiled.pipeline["root"]["inputDefinitions"]["parameters"]
    assert {n for n, p in parameters.items() if not p.get("isOptional")} == {"line", "line_name", "root"}
    assert {n: p["defaultValue"] for n, p in parameters.items() if p.get("isOptional")} == {
        "alias": "",
        "resume_run": "",
        "overrides": [],
        "started_by": "hand",
    }


def test_where_kfp_is_not_installed_the_command_says_which_environment_has_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["kfp", "compile"])
    assert ended.value.code == Exit.USAGE
    assert "run .venv-kfp/bin/qlora-retrain" in capsys.readouterr().err


@pytest.mark.parametrize("image", ["train", "train:latest", "registry.example:5000/train"])
def test_an_image_whose_name_can_move_is_refused(image: str, in_kfp: RunInKfp, tmp_path: Path) -> None:
    out = tmp_path / "retrain.yaml"
    completed = in_kfp("-m", "qlora_retrain.cli", "kfp", "compile", "--out", out, "--train-image", image)
    assert (completed.returncode, out.exists()) == (Exit.USAGE, False)
    assert image in completed.stderr
