"""`make ui`: Airflow's pages on loopback, with a scheduler, so that a person can start runs. Ctrl-C ends it.

Command: `python -m qlora_retrain.demo.ui [--port 8080]`
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qlora_retrain.core.errors import Problem
from qlora_retrain.demo.airflow_api import USER
from qlora_retrain.demo.standalone_airflow import StandaloneAirflow


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m qlora_retrain.demo.ui", description="Airflow's pages")
    parser.add_argument("--port", type=int, default=8080, help="the port on loopback; 0: any free one")
    parser.add_argument("--home", type=Path, help="AIRFLOW_HOME; default .state/airflow")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)

    print("Airflow starts on loopback ...", flush=True)
    try:
        with StandaloneAirflow(arguments.home, port=arguments.port) as airflow:
            print(f"open {airflow.url} as {USER} with the password {airflow.password}; Ctrl-C stops it", flush=True)
            # Until a signal raises KeyboardInterrupt.
            threading.Event().wait()
    except KeyboardInterrupt:
        print("\nstopped", flush=True)
    except Problem as problem:
        print(f"make ui: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


def _raise_keyboard_interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
