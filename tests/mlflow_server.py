"""A real MLflow server on loopback, in an environment of its own: MLflow's requirements conflict with Airflow's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from qlora_retrain.demo import host
from qlora_retrain.pipeline.code_identity import project_root

ENVIRONMENT = project_root() / ".state" / "mlflow"
VERSION = "3.17.2"
_START_SECONDS = 300


def install() -> Path:
    """Install MLflow, once; return the Python that has it.

    The program `mlflow` names that Python by its path, so it does not run where the folder was moved or is a link.
    """
    if not (ENVIRONMENT / "bin" / "mlflow").exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        pip = [ENVIRONMENT / "bin" / "pip", "install", "-q", "--only-binary", ":all:"]
        subprocess.run([*pip, f"mlflow=={VERSION}", "boto3"], check=True)
    return ENVIRONMENT / "bin" / "python"


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Run a server that keeps everything below a folder; yield its address."""
    port, reservation = host.reserve_port()
    with reservation:
        yield from _serve(folder, port)


def _serve(folder: Path, port: int) -> Iterator[str]:
    # Without artifacts and jobs, for which it would start further processes.
    options = ["--no-serve-artifacts", "--default-artifact-root", (folder / "artifacts").as_uri(), "--workers", "1"]
    database = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTHONPATH"))}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [install(), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), *database, *options],
            env={**environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + _START_SECONDS
        while not _answers(f"{url}/health"):
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
