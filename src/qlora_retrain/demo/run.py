"""`make run`: run a line once through a real Airflow, watch it to its end, then ask the published model.

Reads `pipelines/<line>.yaml`; makes a version in the store (`QLORA_RETRAIN_ROOT`, default `.state/store`) and pulls it
to `pulled/<line>` beside AIRFLOW_HOME. A second run finds that nothing changed and starts no step. The exit code is
that of the step that failed. After Ctrl-C it is 130, and the same command continues where it stopped.

Command: `python -m qlora_retrain.demo.run [--line support-intents] [--param train.max_steps=20]`
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core import graph, json_lines, uris
from qlora_retrain.core.errors import Exit, Problem, UsageError
from qlora_retrain.demo.airflow_api import FINAL_STATES, USER, TaskState
from qlora_retrain.demo.progress_board import ProgressBoard
from qlora_retrain.demo.standalone_airflow import StandaloneAirflow
from qlora_retrain.lm import conversations
from qlora_retrain.pipeline import code_identity, run_endings, status
from qlora_retrain.pipeline import plan as plans
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store, pull, registry

INTERRUPTED = 130
_ROWS_PER_SUITE = {"eval": 4, "golden": 2}  # the number of questions to the pulled model
_MAX_ANSWER_CHARACTERS = 90  # of the base model's answer, which has no end of its own
_POLL_SECONDS = 2.0  # each poll costs the API server a tenth of a second of CPU, which training could use


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qlora_retrain.demo.run", description="one run, watched")
    parser.add_argument("--line", default="support-intents", help="a file of pipelines/, without .yaml")
    parser.add_argument(
        "--param", action="append", default=[], type=_parse_param, metavar="NAME=VALUE", help="a field of the form"
    )
    parser.add_argument("--home", type=Path, help="AIRFLOW_HOME; default .state/airflow")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)

    try:
        return run(arguments.line, dict(arguments.param), arguments.home)
    except Problem as problem:
        print(f"make run: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED


def run(line: str, params: Mapping[str, Any], home: Path | None = None) -> int:
    """Start Airflow, run the line once, and print the result."""
    config = load(_pipelines_folder() / f"{line}.yaml")
    root = _store_root()
    started = time.monotonic()

    print("Airflow starts on loopback ...", flush=True)
    with StandaloneAirflow(home, environment={"QLORA_RETRAIN_ROOT": root}) as airflow:
        airflow.wait_for_dag(config.line)
        seconds, login = time.monotonic() - started, f"{USER}, {airflow.password}"
        print(f"Airflow is up after {seconds:.0f} s: {airflow.url} (user and password: {login})", flush=True)

        end_other_runs(airflow, config.line)
        airflow.api.unpause(config.line)

        run_id = airflow.api.trigger(config.line, params)
        run_after = datetime.fromisoformat(airflow.api.dag_run(config.line, run_id)["run_after"])
        # The same id as the tasks compute, so that the run's files can be read while it runs.
        store_run_id = plans.run_id(run_after, config.line, run_id)
        plan, state, tasks = watch(airflow, config.line, run_id, plans.plan_uri(root, store_run_id))
        if state != "success":
            return print_failure(airflow, config.line, run_id, f"{root}/runs/{store_run_id}", tasks)

    assert plan is not None
    print_success(plan, config, airflow.home.parent / "pulled" / config.line)
    print(
        f"took      {time.monotonic() - started:.0f} s\nlook      make ui: this run in Airflow's own pages", flush=True
    )
    return Exit.DONE


def end_other_runs(airflow: StandaloneAirflow, line: str, own_run_id: str = "") -> None:
    """Mark a line's other active runs as failed, because a line has one run at a time, and they would hold up this one.

    Ctrl-C or a crash left them behind, or Airflow started one that was due while it was stopped.
    """
    for run_id in airflow.api.active_run_ids(line):
        if run_id != own_run_id:
            airflow.api.mark_failed(line, run_id)


def watch(
    airflow: StandaloneAirflow, line: str, run_id: str, plan_uri: str
) -> tuple[Plan | None, str, list[TaskState]]:
    """Show the run until it ends; return its plan, its state and its tasks."""
    board = ProgressBoard()
    while True:
        state = airflow.api.dag_run(line, run_id)["state"]
        if state == "queued":
            end_other_runs(airflow, line, run_id)
        tasks = airflow.api.task_states(line, run_id)

        # The plan exists once its task succeeded; the board needs it to find the steps' numbers in the store.
        if board.plan is None and any(t.task_id == graph.PLAN_TASK and t.state == "success" for t in tasks):
            board.plan = Plan.read(plan_uri)
        board.show(tasks)

        # The state was read before the tasks, so a final state means that the tasks are final too.
        if state in FINAL_STATES:
            return board.plan, state, tasks
        time.sleep(_POLL_SECONDS)


def print_failure(
    airflow: StandaloneAirflow, line: str, run_id: str, run_folder: str, tasks: Sequence[TaskState]
) -> int:
    """Print which step failed, why and where its log is; return its exit code.

    Args:
        airflow: The Airflow that has the run.
        line: The line's name.
        run_id: Airflow's id of the run.
        run_folder: The URI of the run's folder in the store, where the endings are.
        tasks: The run's tasks.
    """
    failed_tasks = [task for task in tasks if task.state == "failed"]
    root, _, store_run_id = run_folder.rpartition("/runs/")
    exit_code = int(Exit.BUG)

    for task in failed_tasks:
        ending = run_endings.read(open_store(root), store_run_id, task.task_id)
        # A task that ended before it could write an ending has only Airflow's log.
        message = (
            ending.summary() if ending else airflow.api.failure_message(line, run_id, task.task_id, task.try_number)
        )
        print(f"failed    {task.task_id} (try {task.try_number}): {message}")
        print(f"log       {airflow.log_file(line, run_id, task.task_id, task.try_number)}")
        exit_code = ending.code if ending and ending.code else exit_code

    if not failed_tasks:
        print("failed    no step failed: the run was marked as failed from outside")
    print(f"run       {run_folder}", flush=True)
    return exit_code


def print_success(plan: Plan, config: LineConfig, pulled: Path) -> None:
    """Print what was published and where; then pull the version and ask it questions, to show that it works."""
    if plan.unchanged:
        print(f"\nnothing changed: production is already {plan.unchanged}")
        print(f"folder    {_version_location(plan, plan.unchanged)}")
        return

    store = open_store(plan.root)
    version = str(status.numbers(plan, graph.producer_name("release"))["version"])
    folder = registry.version_folder(plan.line, version)
    verdict = json.loads(store.read(f"{folder}/evaluation/evaluation.json").data)
    alias = plan.moved_alias or registry.LATEST

    print(f"\nversion   {plan.line}@{alias} is {version}")
    print(f"folder    {_version_location(plan, version)}")
    print(f"verdict   {verdict['sentence']}")
    for report in store.children(f"{folder}/reports"):
        print(f"report    {_version_location(plan, version)}/reports/{report}")

    release = pull.pull(store, f"{plan.line}@{alias}", pulled)
    print(f"pulled    {len(release.files)} files, each verified, to {pulled}", flush=True)
    print_answers(plan, config, pulled, verdict)


def print_answers(plan: Plan, config: LineConfig, pulled: Path, verdict: Mapping[str, Any]) -> None:
    """Ask the pulled model a few rows that it was not trained on, and print its answers, right or wrong.

    Nothing is asked unless the line allows the text of rows in reports.
    """
    rows = sample_rows(plan) if config.evaluate.text_in_reports else []
    if not rows:
        return

    is_labels_task = config.data.task == "labels"
    answers = ask_model(pulled, [question for _, question, _ in rows])
    print(f"\nasked     {len(rows)} rows that were never trained on, the first of each kind")

    # Only labels can be right or wrong; other answers are printed without a mark.
    right = 0
    for (suite, question, expected), answer in zip(rows, answers, strict=True):
        right += answer == expected
        word = ("right" if answer == expected else "wrong") if is_labels_task else "wrote"
        print(
            f'{word:<9} {suite}: "{question}"\n          {answer}' + (answer != expected) * f"  (expected: {expected})"
        )
    if is_labels_task:
        print(f"in all    {right} of {len(rows)} right; by the evaluation {_accuracy_by_suite(verdict)}")

    # The base model's answer to the same question shows what the training changed. Without a template of its own it
    # cannot be asked.
    if config.sources.base_model.uri.startswith("file:") and config.data.template is None:
        system = ["--system", config.data.system] if config.data.system else []
        answer = ask_model(uris.local_path(config.sources.base_model.uri), [rows[0][1]], *system)[0]
        print(f"base      to the first: {textwrap.shorten(answer, _MAX_ANSWER_CHARACTERS, placeholder=' ...')}")
    print(flush=True)


def sample_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Return (suite, question, answer) of the first evaluation rows and the first golden rows of the dataset."""
    dataset = status.find_manifest(plan, graph.producer_name("dataset"))
    assert dataset is not None

    rows = []
    for suite, count in _ROWS_PER_SUITE.items():
        text = open_store(plan.root).read(f"{dataset.prefix}/{suite}.jsonl").data.decode()
        for line in json_lines.split_lines(text)[:count]:
            messages = json.loads(line)["messages"]
            questions = [turn["content"] for turn in conversations.prompt_of(messages) if turn["role"] == "user"]
            if questions:
                rows.append((suite, " ".join(questions[-1].split()), conversations.answer_of(messages)))
    return rows


def _accuracy_by_suite(verdict: Mapping[str, Any]) -> str:
    """Format how often the challenger was right, for each suite."""
    suites = {"evaluation": verdict["contestants"], "golden": verdict.get("golden") or {}}
    scores = {name: contestants["challenger"] for name, contestants in suites.items() if "challenger" in contestants}
    return ", ".join(f"{n['accuracy']:.1%} of {n['rows']} {name} rows" for name, n in scores.items())


def ask_model(folder: Path, questions: Sequence[str], *options: str) -> list[str]:
    """Return the answers of a model folder, each on one line; a subprocess loads the model and frees its memory."""
    # `--`, because a question may begin with a dash.
    command = [sys.executable, "-m", "qlora_retrain.cli", "ask", str(folder), *options, "--", *questions]
    completed = subprocess.run(command, check=False, capture_output=True, text=True, cwd=code_identity.project_root())
    if completed.returncode:
        last_line = completed.stderr.strip().rpartition("\n")[2]
        raise UsageError(f"{folder}: `qlora-retrain ask` failed: {last_line}")

    answers = json_lines.split_lines(completed.stdout)
    return answers if len(questions) > 1 else [" ".join(completed.stdout.split())]


def _version_location(plan: Plan, version: str) -> str:
    """Return a version's folder: a path if the store is a folder, otherwise a URI."""
    uri = f"{plan.root}/{registry.version_folder(plan.line, version)}"
    return str(uris.local_path(uri)) if uri.startswith("file:") else uri


def _pipelines_folder() -> Path:
    return Path(os.environ.get("QLORA_RETRAIN_PIPELINES") or code_identity.project_root() / "pipelines")


def _store_root() -> str:
    """Return the same URI as `dag_run.store_root`, which cannot be imported here because it imports Airflow."""
    return uris.absolute(os.environ.get("QLORA_RETRAIN_ROOT") or str(code_identity.project_root() / ".state" / "store"))


def _parse_param(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE, e.g. train.max_steps=20")
    # JSON for numbers, booleans and null; anything else is text, so that it needs no quotes in a shell.
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _raise_keyboard_interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
