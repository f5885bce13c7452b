"""Measure what a run costs in Airflow whose artifacts all exist: beside the same graph of tasks that do nothing.

Both DAGs run in the same Airflow on loopback (LocalExecutor, SQLite), in turn: trigger to success, as Airflow's own
times say. The line is the demo's with fewer steps. It is run once by the command line before, and promotes nothing, so
each later run finds every artifact made.

Command: `python benchmarks/airflow_cached.py [--pairs 5]`. `--work` holds the store, so that it trains only once.
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

import yaml
from training import BASE, PROJECT

sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
LINE = "cached"
SECTIONS = {
    "line": LINE,
    "sources": {"raw_data": str(PROJECT / "pipelines" / "demo" / "tickets.jsonl"), "base_model": str(BASE)},
    "data": {"task": "labels", "eval_fraction": 0.15, "max_eval_rows": 40, "max_length_tokens": 256},
    "train": {"max_steps": 2, "micro_batch_size": 4, "global_batch_size": 4, "precision": "float32"},
    "evaluate": {"allow_first_release": True, "bootstrap_samples": 500, "stop_rows": 0, "train_rows": 0,
                 "base_rows": 30, "intruder_top_k": 0, "max_loss_to_champion": 1.0},
    "merge": {"max_loss_increase_nats": 10.0, "min_prompts": 10},
    "publish": {"promote_to": None},
}  # fmt: skip
DAG_FILE = """
import runpy
globals().update(runpy.run_path({retrain!r}))
from airflow.sdk import DAG, task
from qlora_retrain.core.graph import PLAN_TASK, STEPS, upstream_steps

with DAG("empty", schedule=None, catchup=False) as empty:
    tasks = {{PLAN_TASK: task(task_id=PLAN_TASK)(lambda: None)()}}
    for step in STEPS:
        tasks[step.name] = task(task_id=step.name)(lambda: None)()
    for step in STEPS:
        tasks[step.name].set_upstream([tasks[name] for name in upstream_steps(step) or (PLAN_TASK,)])
"""


def main() -> None:
    """Train once, then run both DAGs in turn, and print the ratio."""
    from qlora_retrain.demo.standalone_airflow import StandaloneAirflow

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "airflow-cached")
    options = parser.parse_args()
    folder = options.work.resolve()
    (folder / "lines").mkdir(parents=True, exist_ok=True)
    (folder / "dags").mkdir(exist_ok=True)
    line = folder / "lines" / f"{LINE}.yaml"
    line.write_text(yaml.safe_dump(SECTIONS), encoding="utf-8")
    (folder / "dags" / "both.py").write_text(DAG_FILE.format(retrain=str(PROJECT / "dags" / "retrain.py")))

    root = (folder / "store").as_uri()
    os.environ["PYTHONPATH"] = os.pathsep.join((str(PROJECT / "src"), str(PROJECT)))
    subprocess.run([sys.executable, "-m", "qlora_retrain.cli", "run", str(line), "--root", root], check=True)
    environment = {"QLORA_RETRAIN_PIPELINES": str(folder / "lines"), "QLORA_RETRAIN_ROOT": root}
    seconds: dict[str, list[float]] = {LINE: [], "empty": []}
    with (
        tempfile.TemporaryDirectory() as home,
        StandaloneAirflow(Path(home), dags=folder / "dags", environment=environment) as airflow,
    ):
        for dag_id in seconds:
            airflow.wait_for_dag(dag_id)
            airflow.api.unpause(dag_id)
        # The first pair is not counted: Airflow is still warming up.
        for i in range(options.pairs + 1):
            for dag_id, measured in seconds.items():
                took = run_once(airflow.api, dag_id)
                if i:
                    measured.append(took)
                print(f"{dag_id}: {took:.1f} s", flush=True)

    cached, empty = (statistics.median(seconds[name]) for name in (LINE, "empty"))
    print(
        f"cached run {cached:.1f} s, empty tasks {empty:.1f} s (medians of {options.pairs}): {cached / empty:.2f} times"
    )


def run_once(api, dag_id: str) -> float:
    """Trigger a DAG and wait; return the seconds from the trigger to the end, by Airflow's clock."""
    run_id = api.trigger(dag_id)
    if (state := api.wait_until_finished(dag_id, run_id, timeout_seconds=300)) != "success":
        sys.exit(f"{dag_id}: the run ended as {state}")
    run = api.dag_run(dag_id, run_id)
    queued, ended = (datetime.fromisoformat(run[name]) for name in ("queued_at", "end_date"))
    return (ended - queued).total_seconds()


if __name__ == "__main__":
    main()
