"""The compiled Kubeflow pipeline equals the graph and the Airflow DAG, and its task 0 is a command that works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_retrain import cli, graph
from qlora_retrain.errors import Exit
from qlora_retrain.plan import Plan

pytestmark = pytest.mark.kfp

PROJECT = Path(__file__).resolve().parents[2]
KFP_PYTHON = PROJECT / ".venv-kfp" / "bin" / "python"
IMAGES = {"light": "registry.example:5000/light:7", "train": "train@sha256:" + "0" * 64}
PLAN_COMMAND = ["python", "-m", "qlora_retrain.cli", "plan"]
LINE = """
line: tickets
sources: {raw_data: tickets.jsonl, base_model: model}
"""
# KFP's own code fills in a command as it does before it starts a container.
FILL_IN = """
import json, sys
from kfp.local.placeholder_utils import replace_placeholders
command, values, output, run = json.load(sys.stdin)
outputs = {"outputFile": output + ".json", "parameters": {"uri": {"outputFile": output}}}
filled = {"inputs": {"parameterValues": values}, "outputs": outputs}
print(json.dumps(replace_placeholders(command, filled, "pipeline", "plan", "root", run)))
"""


def in_kfp(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run the Python that has kfp, on this checkout."""
    if not KFP_PYTHON.exists():
        pytest.fail(f"{KFP_PYTHON} is missing; make it with: make setup")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    command = [str(KFP_PYTHON), *arguments]
    return subprocess.run(command, input=text, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The pipeline as KFP will read it."""
    out = tmp_path_factory.mktemp("kfp") / "new folder" / "retrain.yaml"
    images = ("--light-image", IMAGES["light"], "--train-image", IMAGES["train"])
    done = in_kfp("-m", "qlora_retrain.cli", "kfp", "compile", "--out", str(out), *images)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = yaml.safe_load(out.read_text())
    return found


def kfp_name(name: str) -> str:
    return name.replace("_", "-")


def tasks(compiled: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compiled["root"]["dag"]["tasks"]
    return found


def container(compiled: dict[str, Any], name: str) -> dict[str, Any]:
    """What a task runs, found as KFP finds it: task, component, executor."""
    component = compiled["components"][tasks(compiled)[kfp_name(name)]["componentRef"]["name"]]
    found: dict[str, Any] = compiled["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
    return found


def kfp_edges(compiled: dict[str, Any]) -> set[tuple[str, str]]:
    """(upstream, downstream) by the names that the UI shows, which are the graph's."""
    shown = {key: task["taskInfo"]["name"] for key, task in tasks(compiled).items()}
    return {(shown[up], shown[key]) for key, task in tasks(compiled).items() for up in task.get("dependentTasks", ())}


def closure(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Every pair of which the first runs before the second."""
    while more := {(a, d) for a, b in edges for c, d in edges if b == c} - edges:
        edges = edges | more
    return edges


def test_the_tasks_are_the_plan_and_the_graphs_steps(compiled: dict[str, Any]) -> None:
    names = {graph.PLAN_TASK, *(s.name for s in graph.STEPS)}
    assert set(tasks(compiled)) == {kfp_name(n) for n in names}
    assert {task["taskInfo"]["name"] for task in tasks(compiled).values()} == names
    assert compiled["pipelineInfo"]["name"] == "retrain"


def test_the_edges_are_the_graphs_and_the_plan_comes_before_every_step(compiled: dict[str, Any]) -> None:
    assert kfp_edges(compiled) == set(graph.edges()) | {(graph.PLAN_TASK, s.name) for s in graph.STEPS}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
def test_kubeflow_and_airflow_run_the_same_tasks_in_the_same_order(compiled: dict[str, Any]) -> None:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(PROJECT / "dags"))
    assert bag.import_errors == {}  # so Airflow ignores retrain_kfp.py, which it could not import
    line = yaml.safe_load((PROJECT / "pipelines" / "support-intents.yaml").read_text())["line"]
    airflow = {(up, task.task_id) for task in bag.dags[line].tasks for up in task.upstream_task_ids}
    kubeflow = kfp_edges(compiled)

    def between_steps(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
        return {edge for edge in edges if graph.PLAN_TASK not in edge}

    assert between_steps(kubeflow) == between_steps(airflow)
    # Every KFP step names the plan, whose output it takes; Airflow's name it where nothing else comes before.
    assert closure(kubeflow) == closure(airflow)


@pytest.mark.parametrize("step", graph.STEPS, ids=lambda s: s.name)
def test_a_step_is_the_one_command_in_its_image_with_its_gpus_and_retries(
    compiled: dict[str, Any], step: graph.Step
) -> None:
    runs, task = container(compiled, step.name), tasks(compiled)[kfp_name(step.name)]
    assert runs["command"] == [
        "python",
        "-m",
        f"components.{step.name}",
        "--plan",
        "{{$.inputs.parameters['plan_uri']}}",
    ]
    assert task["inputs"]["parameters"] == {
        "plan_uri": {"taskOutputParameter": {"producerTask": "plan", "outputParameterKey": "uri"}}
    }
    assert runs["image"] == IMAGES[step.image]
    assert runs["env"] == [{"name": "QLORA_RETRAIN_IMAGE", "value": IMAGES[step.image]}]
    accelerator = runs.get("resources", {}).get("accelerator", {})
    assert accelerator.get("resourceCount", "0") == str(step.gpus)
    assert task["retryPolicy"]["maxRetryCount"] == step.retries


def test_kfp_caches_nothing_since_the_stores_keys_do(compiled: dict[str, Any]) -> None:
    assert not any(task["cachingOptions"].get("enableCache") for task in tasks(compiled).values())


def test_only_a_lines_path_and_a_store_must_be_given_to_a_run(compiled: dict[str, Any]) -> None:
    parameters = compiled["root"]["inputDefinitions"]["parameters"]
    assert {n for n, p in parameters.items() if not p.get("isOptional")} == {"config", "root"}
    assert {n: p["defaultValue"] for n, p in parameters.items() if p.get("isOptional")} == {
        "plan_uri": "",
        "overrides": [],
    }


class TaskZero:
    """The compiled command of task 0, filled in by KFP's code and run as its container would run it."""

    def __init__(self, compiled: dict[str, Any], folder: Path) -> None:
        self.task = tasks(compiled)["plan"]
        self.command = container(compiled, "plan")["command"]
        self.folder = folder
        (folder / "tickets.jsonl").write_text("{}\n")
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        (folder / "line.yaml").write_text(LINE)
        self.root = (folder / "store").as_uri()
        self.written = folder / "outputs" / "uri"  # KFP makes no folder for it everywhere

    def run(self, run: str, plan_uri: str = "", overrides: tuple[str, ...] = (), config: str = "line.yaml") -> str:
        """Run it and return the URI that later tasks get."""
        done = self.attempt(run, plan_uri, overrides, config)
        assert done.returncode == 0, done.stderr
        return self.written.read_text()

    def attempt(
        self, run: str, plan_uri: str = "", overrides: tuple[str, ...] = (), config: str = "line.yaml"
    ) -> subprocess.CompletedProcess[str]:
        given = {"config": str(self.folder / config), "root": self.root, "plan_uri": plan_uri, "overrides": overrides}
        run_input = self.task["inputs"]["parameters"]["run"]["runtimeValue"]["constant"]
        filling = json.dumps([self.command, {**given, "run": run_input}, str(self.written), run])
        filled = in_kfp("-c", FILL_IN, text=filling)
        assert filled.returncode == 0, filled.stderr
        program, *arguments = json.loads(filled.stdout)
        assert [program, *arguments[:3]] == PLAN_COMMAND
        self.written.unlink(missing_ok=True)
        return subprocess.run([sys.executable, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def task_zero(compiled: dict[str, Any], tmp_path: Path) -> TaskZero:
    return TaskZero(compiled, tmp_path)


@pytest.mark.slow
def test_a_retried_task_zero_finds_its_plan_and_another_run_makes_its_own(task_zero: TaskZero) -> None:
    first = task_zero.run("run-1", overrides=("train.rank=8", "data.system=Be, 'brief'."))
    plan = Plan.load(first)
    assert plan.step("train_qlora").config["rank"] == 8
    assert plan.step("validate_data").config["system"] == "Be, 'brief'."
    time.sleep(1.1)  # a run's name begins with the second it was made in
    (task_zero.folder / "tickets.jsonl").write_text("{}\n{}\n")  # and the retry must not see newer data
    assert task_zero.run("run-1") == first
    assert Plan.load(first) == plan
    other = task_zero.run("run-2")
    assert Plan.load(other).sources["raw_data"] != plan.sources["raw_data"]


@pytest.mark.slow
def test_task_zero_hands_on_the_plan_of_another_run(task_zero: TaskZero) -> None:
    first = task_zero.run("run-1")
    assert task_zero.run("run-2", plan_uri=first) == first
    (task_zero.folder / "other.yaml").write_text(LINE.replace("tickets\n", "refunds\n"))
    wrong_line = task_zero.attempt("run-3", plan_uri=first, config="other.yaml")
    assert (wrong_line.returncode, task_zero.written.exists()) == (Exit.USAGE, False)
    assert "is a plan of line tickets" in wrong_line.stderr
    both = task_zero.attempt("run-3", plan_uri=first, overrides=("train.rank=8",))
    assert both.returncode == Exit.USAGE


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == Exit.USAGE
    return capsys.readouterr().err


@pytest.mark.parametrize("run", ["{{$.pipeline_job_uuid}}", " "])
def test_task_zero_refuses_a_run_id_that_the_orchestrator_did_not_fill_in(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Taken as an id, every run would find the first run's plan again.
    assert "no orchestrator filled in" in usage_error(["plan", "x.yaml", "--orchestrator-id", run], capsys)


@pytest.mark.parametrize("given", ["train.rank=8", '{"train.rank": 8}', "[8]"])
def test_overrides_that_are_no_json_list_of_settings_are_refused(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--set-json" in usage_error(["plan", "x.yaml", "--set-json", given], capsys)


def test_where_kfp_is_not_installed_the_command_says_which_environment_has_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "run it with .venv-kfp/bin/qlora-retrain" in usage_error(["kfp", "compile"], capsys)


@pytest.mark.parametrize("image", ["train", "train:latest", "registry.example:5000/train"])
def test_an_image_whose_name_can_move_is_refused(image: str, tmp_path: Path) -> None:
    out = tmp_path / "retrain.yaml"
    done = in_kfp("-m", "qlora_retrain.cli", "kfp", "compile", "--out", str(out), "--train-image", image)
    assert (done.returncode, out.exists()) == (Exit.USAGE, False)
    assert image in done.stderr
