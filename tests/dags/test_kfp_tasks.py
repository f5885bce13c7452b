"""The first and the last task of the Kubeflow pipeline: KFP's code fills in the compiled commands, then they run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qlora_retrain.cli import main
from qlora_retrain.core.errors import Exit
from qlora_retrain.pipeline import make_plan
from qlora_retrain.pipeline.plan import Plan

if TYPE_CHECKING:
    from tests.dags.conftest import CompiledPipeline

pytestmark = pytest.mark.kfp

PROJECT = Path(__file__).resolve().parents[2]
CLI = ["python", "-m", "qlora_retrain.cli"]
# The program that fills in a command with KFP's own code, as KFP does before it starts a container.
FILL_IN_PLACEHOLDERS = """
import json, sys
from kfp.local.placeholder_utils import replace_placeholders
command, values, folder, artifacts, names, run = json.load(sys.stdin)
output_artifacts = {name: {"artifacts": [{"name": name, "uri": folder + "/" + name}]} for name in artifacts}
parameters = {name: {"outputFile": folder + "/" + name} for name in names}
outputs = {"outputFile": folder + "/output.json", "parameters": parameters, "artifacts": output_artifacts}
filled = {"inputs": {"parameterValues": values}, "outputs": outputs}
print(json.dumps(replace_placeholders(command, filled, "pipeline", "plan", "root", run)))
"""


class Tasks:
    """The pipeline's first and last task, run as their containers would run them."""

    def __init__(
        self, compiled: CompiledPipeline, in_kfp: Callable[..., subprocess.CompletedProcess[str]], folder: Path
    ) -> None:
        self.compiled, self.in_kfp, self.folder = compiled, in_kfp, folder
        (folder / "tickets.jsonl").write_text("{}\n")
        (folder / "model").mkdir()
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (folder / "model" / name).write_text("{}")
        self.root = (folder / "store").as_uri()
        self.outputs = folder / "outputs"  # does not exist yet: some runners of KFP do not create it

    def line(self, name: str) -> dict[str, object]:
        sources = {"raw_data": str(self.folder / "tickets.jsonl"), "base_model": (self.folder / "model").as_uri()}
        return {"line": name, "sources": sources}

    def plan(self, run: str, **arguments: object) -> str:
        """Run task 0 and return the URI that later tasks get."""
        completed = self.run_task("plan", run, **arguments)
        assert completed.returncode == 0, completed.stderr
        return (self.outputs / "uri").read_text()

    def run_task(
        self, task: str, run: str, *, resume_run: str = "", overrides: tuple[str, ...] = (), line: str = "tickets"
    ) -> subprocess.CompletedProcess[str]:
        arguments = {"line": self.line(line), "root": self.root, "resume_run": resume_run, "overrides": overrides}
        arguments["started_by"] = "hand"
        run_input = self.compiled.tasks[task]["inputs"]["parameters"]["run"]["runtimeValue"]["constant"]
        filled_in = self.fill_in(task, {**arguments, "run": run_input}, run)
        assert filled_in[:3] == CLI
        (self.outputs / "uri").unlink(missing_ok=True)
        return self.execute(filled_in)

    def fill_in(self, task: str, arguments: dict[str, object], run: str = "run-1") -> list[str]:
        """Return a task's command as KFP starts it."""
        outputs = self.compiled.component(task)["outputDefinitions"]
        command = self.compiled.container(task)["command"]
        names = [list(outputs[kind]) if kind in outputs else [] for kind in ("artifacts", "parameters")]
        filling = [command, arguments, str(self.outputs), *names, run]
        filled = self.in_kfp("-c", FILL_IN_PLACEHOLDERS, text=json.dumps(filling))
        assert filled.returncode == 0, filled.stderr
        command_line: list[str] = json.loads(filled.stdout)
        return command_line

    def execute(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *command[1:]], cwd=PROJECT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def tasks(compiled: CompiledPipeline, in_kfp: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> Tasks:
    return Tasks(compiled, in_kfp, tmp_path)


def run_of(uri: str) -> str:
    return Plan.load(uri).run_id


@pytest.mark.slow
def test_a_retried_task_zero_finds_its_plan_and_another_run_makes_its_own(tasks: Tasks) -> None:
    first = tasks.plan("run-1", overrides=("train.rank=8", "data.system=Be, 'brief'."))
    plan = Plan.load(first)
    assert plan.step("train_qlora").config["rank"] == 8
    assert plan.step("validate_data").config["system"] == "Be, 'brief'."
    time.sleep(1.1)  # a run's id begins with the second in which it was made, so the retry could get another
    (tasks.folder / "tickets.jsonl").write_text("{}\n{}\n")  # and the retry must not see newer data
    assert tasks.plan("run-1") == first
    assert Plan.load(first) == plan
    assert "  train_qlora " in (tasks.outputs / "report").read_text()

    another_plan_uri = tasks.plan("run-2")
    assert Plan.load(another_plan_uri).sources["raw_data"] != plan.sources["raw_data"]


def test_a_step_refuses_a_plan_of_another_line_store_or_alias_than_the_runs(tasks: Tasks) -> None:
    (tasks.folder / "line.yaml").write_text(json.dumps(tasks.line("tickets")))
    plan = make_plan.make_plan(tasks.folder / "line.yaml", tasks.root)
    run = {"line_name": "tickets", "root": tasks.root, "alias": "production"}
    command = tasks.fill_in("publish", {"plan_uri": plan.uri, **run})
    for name, foreign, words in [
        ("line_name", "refunds", "expected a plan of line refunds, found one of tickets"),
        ("root", f"{tasks.root}2", f"expected a plan in {tasks.root}2, found one in {tasks.root}"),
        ("alias", "", "moves the alias production, and no alias may be moved"),
        ("alias", "latest", "moves the alias production, and latest may be moved"),
    ]:
        place = command.index({"line_name": "--line", "root": "--root", "alias": "--alias"}[name]) + 1
        assert command[place] == run[name]
        refused = tasks.execute([*command[:place], foreign, *command[place + 1 :]])
        assert (refused.returncode, words in refused.stderr) == (Exit.INTEGRITY, True), refused.stderr
    # Of the run's own line it is not refused, only that nothing is there to publish.
    assert tasks.execute(command).returncode not in (Exit.DONE, Exit.INTEGRITY)


@pytest.mark.slow
def test_task_zero_passes_the_plan_of_another_run_on(tasks: Tasks) -> None:
    first = tasks.plan("run-1")
    assert tasks.plan("run-2", resume_run=run_of(first)) == first
    wrong_line = tasks.run_task("plan", "run-3", resume_run=run_of(first), line="refunds")
    assert (wrong_line.returncode, (tasks.outputs / "uri").exists()) == (Exit.USAGE, False)
    assert "belongs to line tickets" in wrong_line.stderr
    both = tasks.run_task("plan", "run-3", resume_run=run_of(first), overrides=("train.rank=8",))
    assert both.returncode == Exit.USAGE


@pytest.mark.slow
def test_the_last_task_finds_its_runs_plan_and_shows_where_it_stands(tasks: Tasks) -> None:
    before = tasks.run_task("summary", "run-1")
    assert before.returncode == 0, before.stderr
    assert "ended before it had a plan" in (tasks.outputs / "page").read_text()

    first = tasks.plan("run-1")
    tasks.plan("run-2")
    assert tasks.run_task("summary", "run-1").returncode == 0
    page = (tasks.outputs / "page").read_text()
    assert Plan.load(first).run_id in page
    assert "Not finished: validate_data has no artifact yet" in page
    assert (tasks.outputs / "report").read_text() == page, "nothing has a report yet"


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    assert ended.value.code == Exit.USAGE
    return capsys.readouterr().err


@pytest.mark.parametrize("run", ["{{$.pipeline_job_uuid}}", " "])
def test_task_zero_refuses_a_run_id_that_the_orchestrator_did_not_fill_in(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Taken as an id, every run would find the first run's plan again.
    assert "the orchestrator did not fill in" in usage_error(["plan", "x.yaml", "--orchestrator-id", run], capsys)


@pytest.mark.parametrize("arguments", ["train.rank=8", '{"train.rank": 8}', "[8]"])
def test_overrides_that_are_no_json_list_of_settings_are_refused(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--set-json" in usage_error(["plan", "x.yaml", "--set-json", arguments], capsys)
