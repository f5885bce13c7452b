"""How long Airflow's DAG processor takes for `dags/retrain.py`, beyond importing Airflow's own SDK.

Each of five fresh processes imports `airflow.sdk`, then parses the file: first with everything that it imports, then
again with nothing left to import. Prints medians in seconds of CPU and of the clock; the promise is under 1 s.

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
TRIES = 5
ONE = """
import json, runpy, sys, time
def timed(work):
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu
def imports():
    from airflow.sdk import DAG, AssetAlias, BaseOperator, CronTriggerTimetable, Param
found = {"importing airflow.sdk": timed(imports)}
found["first parse, our imports included"] = timed(lambda: runpy.run_path(sys.argv[1]))
found["parse again"] = timed(lambda: runpy.run_path(sys.argv[1]))
print(json.dumps(found))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="DAG parsing time")
    parser.add_argument("--lines", type=int, default=1, help="YAML files in pipelines/")
    lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory() as folder:
        pipelines = Path(folder) / "pipelines"
        pipelines.mkdir()
        source = (PROJECT / "pipelines" / "support-intents.yaml").read_text()
        for i in range(lines):
            (pipelines / f"line-{i}.yaml").write_text(source.replace("support-intents", f"line-{i}"))
        environment = {**os.environ, "AIRFLOW_HOME": folder, "QLORA_RETRAIN_PIPELINES": str(pipelines)}
        command = [sys.executable, "-c", ONE, str(PROJECT / "dags" / "retrain.py")]
        runs = []
        for _ in range(TRIES):
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            shutil.rmtree(Path(folder) / "logs", ignore_errors=True)
    print(f"{lines} lines, median of {TRIES} fresh processes")
    for name in runs[0]:
        clock, cpu = (statistics.median(run[name][i] for run in runs) for i in range(2))
        print(f"{name:<36} {cpu:5.2f} s CPU  {clock:5.2f} s")


if __name__ == "__main__":
    main()
