"""Measure how long Airflow's DAG processor takes for `dags/retrain.py`, beyond importing Airflow's own SDK.

Each of five fresh processes imports `airflow.sdk`, then parses the file twice: first with everything that it imports,
then with nothing left to import. Prints medians in seconds of CPU time and of wall time; the
documentation promises less than 1 s.

Command: `python benchmarks/dag_parsing.py [--lines 1]`
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PROCESSES = 5
# The program of one process: a process can import each module only once.
PROGRAM = """
import json, runpy, sys, time
def measure(work):
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall_start, time.process_time() - cpu_start
def imports():
    from airflow.sdk import DAG, AssetAlias, BaseOperator, CronTriggerTimetable, Param
times = {"importing airflow.sdk": measure(imports)}
times["first parse, our imports included"] = measure(lambda: runpy.run_path(sys.argv[1]))
times["parse again"] = measure(lambda: runpy.run_path(sys.argv[1]))
print(json.dumps(times))
"""


def main() -> None:
    """Run the processes and print the medians."""
    parser = argparse.ArgumentParser(description="DAG parsing time")
    parser.add_argument("--lines", type=int, default=1, help="the number of YAML files in pipelines/")
    lines = parser.parse_args().lines

    with tempfile.TemporaryDirectory() as folder:
        pipelines = Path(folder) / "pipelines"
        pipelines.mkdir()
        source = (PROJECT / "pipelines" / "support-intents.yaml").read_text()
        for i in range(lines):
            (pipelines / f"line-{i}.yaml").write_text(source.replace("support-intents", f"line-{i}"))

        environment = {**os.environ, "AIRFLOW_HOME": folder, "QLORA_RETRAIN_PIPELINES": str(pipelines)}
        command = [sys.executable, "-c", PROGRAM, str(PROJECT / "dags" / "retrain.py")]
        runs = []
        for _ in range(PROCESSES):
            completed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            runs.append(json.loads(completed.stdout.splitlines()[-1]))
            shutil.rmtree(Path(folder) / "logs", ignore_errors=True)

    print(f"{lines} lines, median of {PROCESSES} fresh processes")
    for name in runs[0]:
        wall_seconds, cpu_seconds = (statistics.median(run[name][i] for run in runs) for i in range(2))
        print(f"{name:<36} {cpu_seconds:5.2f} s CPU  {wall_seconds:5.2f} s")


if __name__ == "__main__":
    main()
