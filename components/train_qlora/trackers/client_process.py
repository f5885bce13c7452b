"""Send what arrives on stdin to one tracker. `trackers` starts this program and never waits for it.

A record that cannot be sent is tried again until it can, so a server that is away for a while misses nothing. Each
change between the two is a line on stdout. Imports neither torch nor transformers.

Command: `python -m components.train_qlora.trackers.client_process mlflow|wandb PARENT_PID`
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from qlora_retrain.core import supervisor, uris

# Before a record is tried again; each wait is twice the one before, up to the second number.
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.5, 30.0
# What a client waits for its server by default is minutes.
ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "WANDB_SILENT": "true"}
_MLFLOW_MAX_PARAMS = 100  # in one request
_MLFLOW_MAX_PARAM_LENGTH = 250


def _client_library(name: str) -> Any:
    # Not by an import statement: trackers shape no result, so their versions are not pinned for the step's key.
    return importlib.import_module(name)


class Client(Protocol):
    """What a tracker has to do. Each method may raise, and is then called again."""

    def open(self, settings: dict[str, Any]) -> None:
        """Start a run."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the numbers of a step."""
        ...

    def close(self, succeeded: bool) -> None:
        """End the run."""
        ...


class MLflow:
    """MLflow, as its own environment variables configure it."""

    def open(self, settings: dict[str, Any]) -> None:
        """Start a run, or go on with the one that an earlier try started."""
        mlflow = _client_library("mlflow")
        if name := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            mlflow.set_experiment(name)
        if mlflow.active_run() is None:
            mlflow.start_run()
        if tags := os.environ.get("MLFLOW_TAGS"):
            mlflow.set_tags(json.loads(tags))

        params = [(name, str(value)[:_MLFLOW_MAX_PARAM_LENGTH]) for name, value in settings.items()]
        for start in range(0, len(params), _MLFLOW_MAX_PARAMS):
            mlflow.log_params(dict(params[start : start + _MLFLOW_MAX_PARAMS]))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the numbers under the names that the log has."""
        mlflow = _client_library("mlflow")
        mlflow.log_metrics(values, step=step)

    def close(self, succeeded: bool) -> None:
        """End the run."""
        mlflow = _client_library("mlflow")
        mlflow.end_run("FINISHED" if succeeded else "FAILED")


class WandB:
    """Weights & Biases, as its own environment variables configure it."""

    def open(self, settings: dict[str, Any]) -> None:
        """Start a run in the project that `WANDB_PROJECT` names."""
        wandb = _client_library("wandb")
        if wandb.run is None:
            wandb.init(project=os.environ.get("WANDB_PROJECT", "huggingface"), config=settings)
            wandb.define_metric("train/global_step")
            wandb.define_metric("*", step_metric="train/global_step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the numbers under the names that transformers gives them."""
        wandb = _client_library("wandb")
        named = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in values.items()
        }
        wandb.log({**named, "train/global_step": step})

    def close(self, succeeded: bool) -> None:
        """End the run."""
        wandb = _client_library("wandb")
        wandb.finish(exit_code=0 if succeeded else 1)


CLIENTS: dict[str, Callable[[], Client]] = {"mlflow": MLflow, "wandb": WandB}


def main(name: str, parent_pid: int) -> None:
    """Send every record in order, until the last."""
    supervisor.exit_with_parent(parent_pid, signal.SIGKILL)
    # The step's process decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # transformers' variable, which the client itself does not know.
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        os.environ["WANDB_MODE"] = "disabled"

    # What a client prints must not be taken for a report of ours.
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    # Read by a thread, so that the step's process never waits for this one.
    records: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read_records, args=(sys.stdin, records), daemon=True).start()
    client: Client = CLIENTS[name]()
    while (record := records.get()) is not None:
        _send(client, record, reports)
        if "succeeded" in record:
            break
    # A client's threads may wait for a server that is away; everything is sent.
    os._exit(0)


def _read_records(lines: TextIO, records: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in lines:
        records.put(json.loads(line))
    records.put(None)


def _send(client: Client, record: dict[str, Any], reports: TextIO) -> None:
    """Hand a record to the client, again and again until it takes it."""
    wait_seconds = FIRST_RETRY_SECONDS
    while True:
        try:
            if "settings" in record:
                client.open(record["settings"])
            elif "values" in record:
                client.log(record["step"], record["values"])
            else:
                client.close(record["succeeded"])
        # Whatever a client raises: its network's errors, its own, or one of an older version of it.
        except BaseException as error:  # noqa: BLE001
            if wait_seconds == FIRST_RETRY_SECONDS:
                _report(reports, f"{type(error).__name__}: {error}")
            time.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, MAX_RETRY_SECONDS)
        else:
            if wait_seconds > FIRST_RETRY_SECONDS:
                _report(reports, None)
            return


def _report(reports: TextIO, error: str | None) -> None:
    # A client's message may repeat the server's URI, and the run's log is kept.
    text = uris.mask_secrets(" ".join(error.split()))[:500] if error else None
    reports.write(json.dumps({"error": text}) + "\n")
    reports.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
