"""The supervisor passes SIGTERM on once, kills after the grace period, and lets nothing outlive its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from qlora_retrain.core import supervisor

# However busy the machine is, what is waited for comes sooner.
PATIENCE_SECONDS = 90.0
# Prints "ready", counts the SIGTERMs, and ends one second after the first, as a step that saves its work does.
GRACEFUL = """
import signal, sys, time
count = 0
def term(*_):
    global count
    count += 1
signal.signal(signal.SIGTERM, term)
print("ready", flush=True)
while not count:
    time.sleep(0.02)
time.sleep(1)
print("terms", count, flush=True)
sys.exit(75)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(999)"
)


def start(program: str, grace_seconds: float = 30) -> subprocess.Popen[str]:
    command = supervisor.supervised_command([sys.executable, "-c", program], grace_seconds=grace_seconds)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True)
    assert process.stdout is not None
    if "ready" in program:
        assert process.stdout.readline() == "ready\n"
    return process


def has_ended(pid: int, seconds: float = PATIENCE_SECONDS) -> bool:
    """Wait until the process is gone or a zombie; return False if it still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_the_commands_exit_code_is_passed_on_and_a_signal_is_128_plus_it() -> None:
    for program, code in (("raise SystemExit(11)", 11), ("import os; os.kill(os.getpid(), 9)", 137)):
        with start(program) as process:
            assert process.wait(PATIENCE_SECONDS) == code


def test_a_stopped_command_gets_one_sigterm_and_the_time_to_save() -> None:
    process = start(GRACEFUL)
    process.terminate()
    time.sleep(0.3)
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert (output, process.returncode) == ("terms 1\n", 75)


def test_a_command_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    process = start(STUBBORN, grace_seconds=0.3)
    started = time.monotonic()
    process.terminate()
    process.communicate(timeout=PATIENCE_SECONDS)
    # By itself it would have ended with 0, after more than the patience.
    assert process.returncode == 137
    assert time.monotonic() - started >= 0.3


def test_what_the_command_leaves_behind_goes_with_it() -> None:
    # The grandchild makes a process group of its own, as Airflow's tasks do.
    program = (
        "import os, subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-c', 'import os,time; os.setpgid(0, 0); time.sleep(999)'],"
        " stdout=subprocess.DEVNULL); print(p.pid)"
    )
    process = start(program)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert has_ended(int(output))


def test_when_the_parent_is_killed_the_command_is_asked_to_stop() -> None:
    parent = (
        "import subprocess, sys, time; from qlora_retrain.core import supervisor\n"
        f"command = supervisor.supervised_command([sys.executable, '-c', {GRACEFUL!r}], grace_seconds=30)\n"
        "p = subprocess.Popen(command, start_new_session=True)\nprint(p.pid, flush=True)\ntime.sleep(999)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)

    assert process.stdout is not None
    # The two lines come from two processes, in either order.
    first_lines = {process.stdout.readline().strip(), process.stdout.readline().strip()}
    supervisor_pid = int((first_lines - {"ready"}).pop())
    process.kill()
    # Ends when the last process that holds the pipe does, which is the command.
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)

    assert output == "terms 1\n"
    assert has_ended(supervisor_pid)


def test_a_supervisor_whose_parent_is_dead_already_starts_nothing(tmp_path: Path) -> None:
    flag = tmp_path / "started"
    command = supervisor.supervised_command([sys.executable, "-c", f"open({str(flag)!r}, 'w')"], grace_seconds=1)
    # The id of a process that is not its parent.
    command[3] = str(2**22 - 1)
    assert subprocess.run(command).returncode == 128 + signal.SIGTERM
    assert not flag.exists()
