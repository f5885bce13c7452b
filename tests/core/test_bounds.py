"""The bounds on native code: processor time counts, and how long a busy machine takes does not."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import threading, time
from qlora_retrain.core.bounds import Watchdog

def wait():
    time.sleep(1.0)

def compute():
    while True:
        sum(range(10_000))

with Watchdog(1 << 30, 0.3, "a pattern searches too long"):
    {work}()
print("went on")
"""


def run_program(work: str) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(PROGRAM).format(work=work)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_a_process_that_waits_for_the_processor_is_not_ended() -> None:
    ended = run_program("wait")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "went on\n", "")


def test_a_process_that_computes_too_long_ends_with_the_reason() -> None:
    ended = run_program("compute")
    assert (ended.returncode, ended.stdout, ended.stderr) == (12, "", "a pattern searches too long\n")


def test_a_training_process_that_hangs_in_native_code_reports_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing
    import os

    from components.train_qlora.processes import worker
    from qlora_retrain.core.errors import UsageError

    def stop(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", stop)
    reader, writer = multiprocessing.Pipe(duplex=False)
    with pytest.raises(SystemExit):
        worker._end_process(worker.PipeStream(writer, forwards_lines=True), "a pattern searches too long")
    outcome = reader.recv()
    assert isinstance(outcome, UsageError)
    assert str(outcome) == "a pattern searches too long"
