"""Interrupt an operation at each of its calls to a store, and compare the end with that of one that nothing disturbs.

`check` does the work. `operations.py` has the table of what is interrupted. An `Interruption` says how: the process
dies at a call, the system kills it, or the store fails.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qlora_retrain.core import uris
from qlora_retrain.core.errors import TryAgain
from qlora_retrain.storage import open_store
from qlora_retrain.storage.store import Store
from tests.storage.small_versions import in_child
from tests.storage.visible_state import assert_nothing_false, published

Operation = Callable[[Store], object]
# Runs an operation with a fault at its n-th call; returns whether the operation had fewer calls.
Interruption = Callable[[Store, Operation, int], bool]

WRITES = ("write_if_absent", "swap", "upload", "copy", "delete")
READS = ("read", "read_range", "sha256", "list", "children", "download")
# Of the calls for several files, the place of the argument that lists them.
_FILES_ARGUMENT = {"upload": 2, "download": 1, "copy": 0, "delete": 0}
# The calls that change a file system, by Python's names of their audit events; `open` counts where it may write.
_CHANGES = ("os.rename", "os.mkdir", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.chmod")
_REQUEST = "http.client.send"


class Died(BaseException):
    """The process is gone: nothing may handle it."""


class Fault:
    """A fault at the n-th call of a store; a call for several files counts as one for each file.

    Args:
        call: The number of the call, from 1.
        error: The class of what is raised.
        is_after: Whether the call takes effect first, as where its answer is lost.
        is_lasting: Whether every later call fails too: those of a dead process, or to a server that is gone.
    """

    def __init__(self, call: int, error: type[BaseException], *, is_after: bool, is_lasting: bool) -> None:
        self._call, self._error, self._is_after, self._is_lasting = call, error, is_after, is_lasting
        self._lock = threading.Lock()
        self.num_calls = 0

    @contextlib.contextmanager
    def inject(self, store: Store, methods: Iterable[str]) -> Iterator[None]:
        """Let these methods of a store have the fault, in the block."""
        methods = tuple(methods)
        for name in methods:
            setattr(store, name, self._wrap(name, getattr(store, name)))
        try:
            yield
        finally:
            for name in methods:
                delattr(store, name)

    def _wrap(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = None
            for part in _for_each_file(name, arguments):
                result = self._count(lambda part=part: method(*part, **options))
            return result

        return call

    def _count(self, method: Callable[[], Any]) -> Any:
        with self._lock:
            self.num_calls += 1
            is_first, is_later = self.num_calls == self._call, self.num_calls > self._call
        if (is_first and not self._is_after) or (is_later and self._is_lasting):
            raise self._error("a test's fault")
        result = method()
        if is_first:
            raise self._error("a test's fault")
        return result


def _for_each_file(name: str, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    place = _FILES_ARGUMENT.get(name)
    if place is None:
        return [arguments]
    return [(*arguments[:place], [item], *arguments[place + 1 :]) for item in arguments[place]]


def dies(*, is_after: bool) -> Interruption:
    """The process dies before or right after its n-th write; what it would still have cleaned up stays."""

    def interruption(store: Store, operation: Operation, call: int) -> bool:
        fault = Fault(call, Died, is_after=is_after, is_lasting=True)
        with contextlib.suppress(Died), fault.inject(store, WRITES):
            operation(store)
        return fault.num_calls < call

    return interruption


def fails(*, is_after: bool = False, is_lasting: bool = False) -> Interruption:
    """The n-th call of the store fails with `TryAgain`; a lasting fault is that of a server that is gone."""

    def interruption(store: Store, operation: Operation, call: int) -> bool:
        fault = Fault(call, TryAgain, is_after=is_after, is_lasting=is_lasting)
        with contextlib.suppress(TryAgain), fault.inject(store, WRITES + READS):
            operation(store)
        return fault.num_calls < call

    return interruption


def is_killed(store: Store, operation: Operation, call: int) -> bool:
    """A process of its own is killed before its n-th change of the store's folder, or n-th request to a server."""

    def killed() -> None:
        kill_at(call, store.uri.removeprefix("file://").replace("%20", " "))()
        operation(open_store(store.uri))

    ended = in_child(killed)
    assert ended in (0, -signal.SIGKILL)
    return ended == 0


def kill_at(call: int, folder: str) -> Callable[[], None]:
    """Return a function that has this process killed before its n-th change below a folder, or request to a server."""
    remaining = call

    def count() -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event == _REQUEST or (is_change and any(folder in str(argument) for argument in arguments[:2])):
            count()

    def install() -> None:
        sys.addaudithook(hook)

    return install


def check(
    store: Store,
    operation: Operation,
    interruption: Interruption,
    *,
    every: int = 1,
    state: Callable[[Store], object] | None = None,
) -> int:
    """Interrupt an operation at its calls, and compare what two repetitions leave with an operation that runs twice.

    After every interruption, and at the end, no alias names a version that does not verify.

    Args:
        store: The store, with what the operation begins from.
        operation: The operation. It ends right, or raises what the interruption raises.
        interruption: The way in which it is interrupted.
        every: 1 for every call, 2 for every second one, and so on.
        state: Returns what is compared; None: `published`.

    Returns:
        The number of interruptions.
    """
    state = state or published
    begin = Snapshot(store)
    expected = None
    for _ in range(2):
        operation(store)
        assert_nothing_false(store)
        assert expected in (None, state(store)), "the second time it does more"
        expected = state(store)

    for number, call in enumerate(itertools.count(1, every)):
        begin.restore()
        is_finished = interruption(store, operation, call)
        assert_nothing_false(store)
        for _ in range(2):
            operation(store)
            # Under the number of the call, so that a failure shows it beside the difference.
            assert {call: state(store)} == {call: expected}
        assert_nothing_false(store)
        if is_finished:
            return number
    raise AssertionError("an operation ends")


class Snapshot:
    """The files of a store, from which an operation can begin again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files = {entry.path: (entry.tag, store.read(entry.path).data) for entry in store.list("")}

    def restore(self) -> None:
        """Let the store have these files and no others."""
        if self._store.uri.startswith("file:"):
            root = uris.local_path(self._store.uri)
            shutil.rmtree(root)
            for path, (_, data) in self._files.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(data)
            return
        entries = list(self._store.list(""))
        same = {entry.path for entry in entries if self._files.get(entry.path, ("", b""))[0] == entry.tag}
        self._store.delete([entry.path for entry in entries if entry.path not in same])
        for path in self._files.keys() - same:
            self._store.write_if_absent(path, self._files[path][1])
