"""Measure what a run costs in Airflow whose artifacts all exist: beside the same graph of tasks that do nothing.

Both DAGs run in the same Airflow on loopback (LocalExecutor, SQLite), in turn: trigger to success, as Airflow's own
times say. The line is the demo's with fewer steps. It is run once by the command line before, and promotes nothing, so
each later run finds every artifact made. Each DAG has a file of its own, as tasks parse the file of their DAG.

Command: `python benchmarks/airflow_cached.py [--pairs 7]`. `--work` holds the store, so that it trains only once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
LINE, EMPTY = "cached", "empty"
SECTIONS = {
    "line": LINE,
    "sources": {
        "raw_data": str(PROJECT / "pipelines" / "demo" / "tickets.jsonl"),
        "base_model": str(PROJECT / ".state" / "base" / "smollm2-135m-instruct"),
    },
    "data": {"task": "labels", "eval_fraction": 0.15, "max_eval_rows": 40, "max_length_tokens": 256},
    "train": {"max_steps": 40, "learning_rate": 1e-3, "micro_batch_size": 4, "global_batch_size": 4,
              "precision": "float32"},
    "evaluate": {"allow_first_release": True, "bootstrap_samples": 500, "stop_rows": 0, "train_rows": 0,
                 "base_rows": 30, "intruder_top_k": 0, "max_loss_to_champion": 1.0},
    "merge": {"max_loss_increase_nats": 10.0, "min_prompts": 10},
    "publish": {"promote_to": None},
}  # fmt: skip
# Of the other file's names the DAGs alone: with its `__file__`, Airflow would look for this file's DAGs there.
LINE_FILE = """
# Airflow reads no file that does not name it.
import runpy
globals().update({{name: value for name, value in runpy.run_path({retrain!r}).items() if name.startswith("dag ")}})
"""
EMPTY_FILE = """
from airflow.sdk import DAG, task
from qlora_retrain.core.graph import PLAN_TASK, STEPS, upstream_steps

def do_nothing():
    pass

with DAG("empty", schedule=None, catchup=False) as empty:
    tasks = {name: task(task_id=name)(do_nothing)() for name in (PLAN_TASK, *(step.name for step in STEPS))}
    for step in STEPS:
        tasks[step.name].set_upstream([tasks[name] for name in upstream_steps(step) or (PLAN_TASK,)])
"""


def main() -> None:
    """Train once, then run both DAGs in turn, and print the ratio."""
    from qlora_retrain.demo.standalone_airflow import StandaloneAirflow

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "airflow-cached")
    options = parser.parse_args()
    folder = options.work.resolve()
    for name in ("lines", "dags"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    line = folder / "lines" / f"{LINE}.yaml"
    line.write_text(yaml.safe_dump(SECTIONS), encoding="utf-8")
    retrain = str(PROJECT / "dags" / "retrain.py")
    (folder / "dags" / "line_dag.py").write_text(LINE_FILE.format(retrain=retrain), encoding="utf-8")
    (folder / "dags" / "empty_dag.py").write_text(EMPTY_FILE, encoding="utf-8")

    root = (folder / "store").as_uri()
    os.environ["PYTHONPATH"] = os.pathsep.join((str(PROJECT / "src"), str(PROJECT)))
    subprocess.run([sys.executable, "-m", "qlora_retrain.cli", "run", str(line), "--root", root], check=True)
    environment = {"QLORA_RETRAIN_PIPELINES": str(folder / "lines"), "QLORA_RETRAIN_ROOT": root}
    seconds: dict[str, list[float]] = {LINE: [], EMPTY: []}
    with (
        tempfile.TemporaryDirectory() as home,
        StandaloneAirflow(Path(home), dags=folder / "dags", environment=environment) as airflow,
    ):
        for dag_id in seconds:
            airflow.wait_for_dag(dag_id)
            airflow.api.unpause(dag_id)
        # The first pair is not counted: Airflow is still warming up.
        for i in range(options.pairs + 1):
            for dag_id in seconds if i % 2 else reversed(seconds):
                took = run_once(airflow.api, dag_id)
                if i:
                    seconds[dag_id].append(took)
                print(f"{dag_id}: {took:.1f} s", flush=True)

    ratios = [cached / empty for cached, empty in zip(seconds[LINE], seconds[EMPTY], strict=True)]
    cached, empty = (statistics.median(values) for values in seconds.values())
    print(
        f"{options.pairs} pairs, medians: cached run {cached:.1f} s, empty tasks {empty:.1f} s; ratio of the pairs "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def run_once(api: Any, dag_id: str) -> float:
    """Trigger a DAG and wait; return the seconds from the trigger to the end, by Airflow's clock."""
    run_id = api.trigger(dag_id)
    state = api.wait_until_finished(dag_id, run_id, timeout_seconds=600)
    tasks = {task.task_id: round(task.duration_seconds, 1) for task in api.task_states(dag_id, run_id)}
    if state != "success":
        reasons = {name: api.failure_message(dag_id, run_id, name) for name in tasks}
        sys.exit(f"{dag_id}: the run ended as {state}: {reasons}")
    print(f"  {tasks}", flush=True)
    run = api.dag_run(dag_id, run_id)
    queued, ended = (datetime.fromisoformat(run[name]) for name in ("queued_at", "end_date"))
    return (ended - queued).total_seconds()


if __name__ == "__main__":
    main()
