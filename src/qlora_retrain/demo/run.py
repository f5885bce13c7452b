"""`make run`: one run of a line through a real Airflow, watched to its end; then the published model is asked.

Reads `pipelines/<line>.yaml`; makes a version in the store (`QLORA_RETRAIN_ROOT`, default `.state/store`) and pulls it
to `pulled/<line>` beside AIRFLOW_HOME. A second run finds that nothing changed and starts no step. Ends with the exit
code of the step that failed; with 130 after Ctrl-C, and then the same command goes on where it stopped.

Command: `python -m qlora_retrain.demo.run [--line support-intents] [--param train.max_steps=20]`
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
from qlora_retrain.core import uris
from qlora_retrain.core.errors import Exit, Problem, UsageError
from qlora_retrain.core.graph import PLAN_TASK
from qlora_retrain.demo.airflow_api import RUN_ENDED, TaskState
from qlora_retrain.demo.progress_board import Board
from qlora_retrain.demo.standalone_airflow import EmbeddedAirflow
from qlora_retrain.pipeline import code_identity, execute, plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store, pull, registry

INTERRUPTED = 130
_ASKED = {"eval": 4, "golden": 2}  # rows of each suite that the pulled model is asked
_SHOWN = 90  # characters of what the base writes, which goes on and on
_POLL_SECONDS = 2.0  # each look costs the API server a tenth of a second of CPU, which training could use
# How `airflow_steps` words the end of a task: "data refused (10): validate_data: ..."
_ENDING = re.compile(r"\((\d+)\)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qlora_retrain.demo.run", description="one run, watched")
    parser.add_argument("--line", default="support-intents", help="a file of pipelines/, without .yaml")
    parser.add_argument("--param", action="append", default=[], type=_param, metavar="NAME=VALUE", help="the form's")
    parser.add_argument("--home", type=Path, help="AIRFLOW_HOME; default .state/airflow")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        return run(arguments.line, dict(arguments.param), arguments.home)
    except Problem as problem:
        print(f"make run: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where this one stopped", file=sys.stderr)
        return INTERRUPTED


def run(line: str, params: Mapping[str, Any], home: Path | None = None) -> int:
    """Start Airflow, run the line once, tell how it went."""
    config = load(_pipelines() / f"{line}.yaml")
    root = _root()
    started = time.monotonic()
    print("Airflow starts on loopback ...", flush=True)
    with EmbeddedAirflow(home, environment={"QLORA_RETRAIN_ROOT": root}) as airflow:
        airflow.wait_for_dag(config.line)
        print(f"Airflow is up after {time.monotonic() - started:.0f} s: {airflow.url}", flush=True)
        for earlier in airflow.api.active_runs(config.line):  # what Ctrl-C or a crash left behind
            airflow.api.end(config.line, earlier)
        airflow.api.unpause(config.line)
        run_id = airflow.api.trigger(config.line, params)
        made, state, tasks = watch(airflow, config.line, run_id, root)
        if state != "success":
            return tell_failure(airflow, config.line, run_id, made, tasks)
    assert made is not None
    tell_success(made, config, airflow.home.parent / "pulled" / config.line)
    print(
        f"took      {time.monotonic() - started:.0f} s\nlook      make ui: this run in Airflow's own pages", flush=True
    )
    return Exit.DONE


def watch(airflow: EmbeddedAirflow, line: str, run_id: str, root: str) -> tuple[Plan | None, str, list[TaskState]]:
    """Show the run until it ends: its plan, its state, its tasks."""
    board = Board()
    found = airflow.api.run(line, run_id)
    uri = plan.plan_uri(root, plan.run_id(datetime.fromisoformat(found["run_after"]), line, run_id))
    while True:
        state = airflow.api.run(line, run_id)["state"]
        tasks = airflow.api.tasks(line, run_id)
        if board.plan is None and any(t.name == PLAN_TASK and t.state == "success" for t in tasks):
            board.plan = Plan.load(uri)
        board.show(tasks)
        if state in RUN_ENDED:
            return board.plan, state, tasks
        time.sleep(_POLL_SECONDS)


def tell_failure(
    airflow: EmbeddedAirflow, line: str, run_id: str, made: Plan | None, tasks: Sequence[TaskState]
) -> int:
    """Say which step failed, why and where its log is; return its exit code."""
    failed = [task for task in tasks if task.state == "failed"]
    exit_code = int(Exit.BUG)
    for task in failed:
        why = airflow.api.why(line, run_id, task.name, task.tries)
        print(f"failed    {task.name} (try {task.tries}): {why}")
        print(f"log       {airflow.log_file(line, run_id, task.name, task.tries)}")
        if ending := _ENDING.search(why):
            exit_code = int(ending[1])
    if not failed:
        print("failed    the run was ended from outside; no step failed")
    if made is not None:
        print(f"run       {made.root}/runs/{made.run_id}", flush=True)
    return exit_code


def tell_success(made: Plan, config: LineConfig, pulled: Path) -> None:
    """Say what was published and where, and show that it works: pull it and ask it."""
    if made.unchanged:
        print(f"\nnothing changed: production is already {made.unchanged}")
        print(f"folder    {_shown(made, made.unchanged)}")
        return
    store = open_store(made.root)
    version = str(execute.summary(made, "publish")["version"])
    folder = registry.version_folder(made.line, version)
    verdict = json.loads(store.read(f"{folder}/evaluation/evaluation.json").data)
    alias = config.publish.promote_to or registry.LATEST
    print(f"\nversion   {made.line}@{alias} is {version}")
    print(f"folder    {_shown(made, version)}")
    print(f"verdict   {verdict['sentence']}")
    for report in store.children(f"{folder}/reports"):
        print(f"report    {_shown(made, version)}/reports/{report}")
    release = pull.pull(store, f"{made.line}@{alias}", pulled)
    print(f"pulled    {len(release.files)} files, each verified, to {pulled}", flush=True)
    tell_answers(made, config, pulled, verdict)


def tell_answers(made: Plan, config: LineConfig, pulled: Path, verdict: Mapping[str, Any]) -> None:
    """Ask the pulled model a few rows that it was not trained on, whatever it makes of them.

    Only where the line allows rows' text to be shown.
    """
    asked = held_out(made) if config.evaluate.text_in_reports else []
    if not asked:
        return
    judged = config.data.task == "labels"
    told = ask(pulled, [question for _, question, _ in asked])
    print(f"\nasked     {len(asked)} rows that were never trained on, the first of each kind")
    right = 0
    for (kind, question, wanted), answer in zip(asked, told, strict=True):
        right += answer == wanted
        word = ("right" if answer == wanted else "wrong") if judged else "wrote"
        print(f'{word:<9} {kind}: "{question}"\n          {answer}' + (answer != wanted) * f"  (wanted: {wanted})")
    if judged:
        print(f"in all    {right} of {len(asked)} right; by the evaluation {_shares(verdict)}")
    if config.sources.base_model.uri.startswith("file:"):
        system = ["--system", config.data.system] if config.data.system else []
        answer = ask(uris.local_path(config.sources.base_model.uri), [asked[0][1]], *system)[0]
        print(f"base      to the first: {textwrap.shorten(answer, _SHOWN, placeholder=' ...')}")
    print(flush=True)


def held_out(made: Plan) -> list[tuple[str, str, str]]:
    """(suite, question, answer) of the first evaluation rows and the first golden ones, in the order of the data."""
    dataset = execute.manifest(made, "validate_data")
    assert dataset is not None
    found = []
    for suite, most in _ASKED.items():
        text = open_store(made.root).read(f"{dataset.prefix}/{suite}.jsonl").data.decode()
        for line in text.splitlines()[:most]:
            turns = json.loads(line)["messages"]
            found.append((suite, " ".join(turns[-2]["content"].split()), turns[-1]["content"]))
    return found


def _shares(verdict: Mapping[str, Any]) -> str:
    """How often the live model was right, on each suite."""
    suites = {"evaluation": verdict["contestants"], "golden": verdict.get("golden") or {}}
    found = {name: numbers["challenger"] for name, numbers in suites.items() if "challenger" in numbers}
    return ", ".join(f"{n['accuracy']:.1%} of {n['rows']} {name} rows" for name, n in found.items())


def ask(folder: Path, questions: Sequence[str], *options: str) -> list[str]:
    """The answers of a model folder, each on one line; in a process of its own, which gives its memory back."""
    command = [sys.executable, "-m", "qlora_retrain.cli", "ask", str(folder), *options, "--", *questions]
    found = subprocess.run(command, check=False, capture_output=True, text=True, cwd=code_identity.project_root())
    if found.returncode:
        raise UsageError(f"{folder}: cannot be asked: {found.stderr.strip().splitlines()[-1:]}")
    answers = found.stdout.splitlines()
    return answers if len(questions) > 1 else [" ".join(found.stdout.split())]


def _shown(made: Plan, version: str) -> str:
    """A version's folder, as a path where it is one."""
    uri = f"{made.root}/{registry.version_folder(made.line, version)}"
    return str(uris.local_path(uri)) if uri.startswith("file:") else uri


def _pipelines() -> Path:
    return Path(os.environ.get("QLORA_RETRAIN_PIPELINES") or code_identity.project_root() / "pipelines")


def _root() -> str:
    """The store, as `airflow_steps` finds it; not imported from there, for that imports Airflow."""
    return uris.absolute(os.environ.get("QLORA_RETRAIN_ROOT") or str(code_identity.project_root() / ".state" / "store"))


def _param(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: wanted NAME=VALUE, e.g. train.max_steps=20")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _as_interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
