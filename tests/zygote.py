"""Start programs that have their modules already: forked from a server that imported torch and transformers once.

Most of what a short step costs is importing: 4 CPU seconds of 5. A test whose subject is what a program does, not how
it starts, may start it here. `Zygote.popen` is `subprocess.Popen` for `[sys.executable, "-m", module, ...]` and
`[sys.executable, file, ...]`. The program gets its own arguments, environment, folder, session, streams and exit code.
Its processes are real, with real parents, signals and deaths. The Python programs that it starts are forked from it in
turn, and so are the training processes, so that parents stay parents. Everything else is executed as ever.

A forked program does not show that a fresh interpreter finds its modules, nor what `spawn` must pickle. Tests that
execute their programs show that: of the command line, containers, the demo, and some with one and two training
processes.

Command of the server: `python tests/zygote.py SOCKET_FD OWNER_PID`
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

PROJECT = Path(__file__).resolve().parents[1]
MODULES = (
    "components.validate_data.step",
    "components.quantize_model.step",
    "components.train_qlora.step",
    "components.train_qlora.train",
    "components.evaluate.step",
    "components.merge_adapter.step",
    "components.publish.step",
    "qlora_retrain.cli.main",
    "qlora_retrain.runtimes.local",
    # transformers imports these two when the first model is loaded.
    "transformers.models.llama.modeling_llama",
    "transformers.integrations.bitsandbytes",
)
Popen = subprocess.Popen  # `subprocess.Popen` itself is replaced in a forked program


def program_words(command: Sequence[str]) -> list[str] | None:
    """Return what follows the interpreter and its flags; None if the command is not a Python program to fork."""
    words = [os.fspath(word) for word in command]
    if not words or words[0] != sys.executable:
        return None

    words = words[2:] if words[1:2] == ["-I"] else words[1:]
    if words[:1] == ["-m"]:
        return words if words[1].startswith(("components.", "qlora_retrain.")) else None
    return words if words and words[0].endswith(".py") else None


class ForkingPopen(Popen):  # type: ignore[type-arg]
    """A `Popen` that forks Python programs from this process instead of executing them."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: bool, p2cread: int, p2cwrite: int,
                       c2pread: int, c2pwrite: int, errread: int, errwrite: int, restore_signals: bool, gid: Any,
                       gids: Any, uid: Any, umask: int, start_new_session: bool,
                       process_group: int = -1) -> None:  # fmt: skip
        words = None if shell or isinstance(args, str | bytes) else program_words(args)
        if words is None:
            super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
                start_new_session, process_group,
            )  # fmt: skip
            return

        # What is in the buffers now would otherwise be written twice, by the parent and by the child.
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            streams = (p2cread, c2pwrite, errwrite)
            _become_program(words, os.environ if env is None else env, cwd, streams, start_new_session, preexec_fn)
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def _become_program(
    words: Sequence[str],
    environment: Mapping[str, str],
    cwd: str | os.PathLike[str] | None,
    streams: Sequence[int],
    start_new_session: bool,
    preexec_fn: Callable[[], object] | None = None,
) -> NoReturn:
    """Run a program in this process, which was forked for it, and end the process with its exit code."""
    environment = dict(environment)
    exit_code = 1
    try:
        if start_new_session:
            os.setsid()

        # Duplicates first: a stream may have the number that another one is to get.
        duplicates = [os.dup(stream) if stream >= 0 else -1 for stream in streams]
        for number, duplicate in enumerate(duplicates):
            if duplicate >= 0:
                os.dup2(duplicate, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))

        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if preexec_fn is not None:
            preexec_fn()

        os.environ.clear()
        os.environ.update(environment)
        if cwd is not None:
            os.chdir(cwd)
        _forget_parent_state()

        # Opened as an interpreter opens them, except that stdout is line-buffered as under PYTHONUNBUFFERED.
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        exit_code = _run_program(words)
    except BaseException:  # noqa: BLE001 - nothing of the parent's code may go on in this process
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def _forget_parent_state() -> None:
    """Drop what belongs to the parent process: its exit handlers, its children, its names of temporary files."""
    from multiprocessing import process, util

    atexit._clear()
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    process._children.clear()  # type: ignore[attr-defined]
    tempfile._name_sequence = None  # type: ignore[attr-defined]
    subprocess._active.clear()  # type: ignore[attr-defined]


def _run_program(words: Sequence[str]) -> int:
    """Run a module or a file as `__main__`, then what it registered for its exit; return its exit code."""
    is_module = words[0] == "-m"
    sys.argv = list(words[1:] if is_module else words)
    sys.modules.pop("__main__", None)
    try:
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
        exit_code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        # An interpreter that ends this way reports the signal and not an exit code.
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        exit_code = 130
    except BaseException:  # noqa: BLE001 - printed, as an interpreter does
        traceback.print_exc()
        exit_code = 1

    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    return exit_code


def fork_instead_of_executing() -> None:
    """Have this process fork its Python programs, and the processes that multiprocessing would spawn."""
    import multiprocessing

    get_context = multiprocessing.get_context
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    multiprocessing.get_context = lambda method=None: get_context(  # type: ignore[assignment]
        "fork" if method == "spawn" else method
    )


class Zygote:
    """The server as a process of this one, ready as soon as it has imported everything; requests wait until then."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "zygote.sock"
        self.log = folder / "zygote.log"
        with socket.socket(socket.AF_UNIX) as listener, self.log.open("wb") as log:
            listener.bind(str(self.path))
            listener.listen(64)
            self.process = Popen(
                [sys.executable, __file__, str(listener.fileno()), str(os.getpid())],
                pass_fds=[listener.fileno()],
                cwd=PROJECT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "src")])},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def close(self) -> None:
        """End the server; programs that still run go on."""
        self.process.kill()
        self.process.wait()

    def popen(self, command: Sequence[str], **options: Any) -> ZygotePopen:
        """Start a program with the options of `subprocess.Popen`, in a session of its own."""
        return ZygotePopen(self, command, **options)


class ZygotePopen(Popen):  # type: ignore[type-arg]
    """A `Popen` whose program is no child of this process: its exit status comes over a socket."""

    def __init__(self, zygote: Zygote, command: Sequence[str], **options: Any) -> None:
        self._zygote = zygote
        super().__init__(command, **options)

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: bool, p2cread: int, p2cwrite: int,
                       c2pread: int, c2pwrite: int, errread: int, errwrite: int, *_: Any) -> None:  # fmt: skip
        words = program_words(args)
        assert words is not None, f"this is no Python program that can be forked: {args}"
        request = {
            "words": words,
            "environment": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
        }

        self._status_socket = socket.socket(socket.AF_UNIX)
        try:
            with open(os.devnull, "r+b") as null:  # noqa: PTH123
                inherited = (null.fileno(), 1, 2)
                streams = [
                    stream if stream >= 0 else default
                    for stream, default in zip((p2cread, c2pwrite, errwrite), inherited, strict=True)
                ]
                self._status_socket.connect(str(self._zygote.path))
                _send_request(self._status_socket, json.dumps(request).encode(), streams)
            self.pid = int.from_bytes(self._status_socket.recv(8, socket.MSG_WAITALL), "big")
            assert self.pid, "the zygote ended before it started the program"
        except (OSError, AssertionError) as error:
            self._status_socket.close()
            error.add_note(f"The zygote's log: {self._zygote.log.read_text()}")
            raise
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _receive_status(self, flags: int) -> int | None:
        """Return the wait status; None while the program runs, if `flags` say not to wait."""
        with contextlib.suppress(BlockingIOError):
            message = self._status_socket.recv(64, flags)
            self._status_socket.close()
            # The socket closes without a message where the process that waits for the program was killed.
            return int(message) if message else signal.SIGKILL
        return None

    # The two places where `Popen` calls waitpid, which works for children only.
    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        status = self._receive_status(socket.MSG_DONTWAIT if wait_flags & os.WNOHANG else 0)
        return (0, 0) if status is None else (self.pid, status)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                if self.returncode is None:
                    status = self._receive_status(socket.MSG_DONTWAIT)
                    if status is not None:
                        self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode  # type: ignore[no-any-return]


def _send_request(connection: socket.socket, message: bytes, fds: Sequence[int]) -> None:
    """Send the length with the file descriptors, then the message."""
    header = len(message).to_bytes(8, "big")
    connection.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    connection.sendall(message)


def _receive_request(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a message and its file descriptors."""
    header, ancillary, *_ = connection.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    fds = array.array("i")
    for _level, _type, data in ancillary:
        fds.frombytes(data)

    message = b""
    while len(message) < int.from_bytes(header, "big"):
        message += connection.recv(65536)
    return message, list(fds)


def serve(listener: socket.socket, owner_pid: int) -> NoReturn:
    """Import every module once, then fork for every request a process that starts the program and waits for its end."""
    from qlora_retrain.core import supervisor

    supervisor.exit_with_parent(owner_pid, signal.SIGKILL)
    # Before transformers is imported, as in a training process.
    for name in MODULES:
        import_module(name)

    # Nobody waits for the processes that wait for programs.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # A garbage collection in a child would write to, and so copy, the pages that all of them share.
    gc.collect()
    gc.freeze()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _serve_request(connection)
        connection.close()


def _serve_request(connection: socket.socket) -> NoReturn:
    """Start the program, send its process id, and its wait status once it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams = _receive_request(connection)
    request = json.loads(message)
    pid = os.fork()
    if pid == 0:
        fork_instead_of_executing()
        _become_program(request["words"], request["environment"], request["cwd"], streams, start_new_session=True)

    # The pipes of the program end with the program, so no other process may hold them.
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(OSError):
        connection.sendall(pid.to_bytes(8, "big"))
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.sendall(str(status).encode())
    os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
