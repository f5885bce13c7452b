"""Write a step's ending, as its last act, to every place where a runtime or a person reads it.

    stdout                                one marked line
    /dev/termination-log                  in a pod, Kubernetes shows it as the container's termination message
    --ending-to FILE                      KFP's output parameter `ending`
    runs/<run_id>/endings/<step>.json     in the store, the newest ending of the step in this run

Losing one of them never changes how the step ended. Where a step could write none, because it was killed or never
started, the runtime writes the last one, e.g. that an image could not be pulled.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from pathlib import Path

from qlora_retrain.core import endings, signals
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Problem
from qlora_retrain.storage import open_store
from qlora_retrain.storage.store import NotFound, Store

TERMINATION_LOG = Path("/dev/termination-log")
# Kubernetes keeps 4,096 bytes of a container's message.
_TERMINATION_LOG_BYTES = 4096
# Readers of a step's output take lines of up to 64 KiB, so that output without a line break fills no memory.
_LINE_BYTES = 32 * 1024


# A healthy store takes a second. One that does not answer is tried for minutes by its client, longer than the 60 s
# that a step has after a SIGTERM.
_STORE_SECONDS = 10.0


def write(ending: Ending, *, root: str | None, run_id: str | None, ending_to: Path | None = None) -> bool:
    """Write an ending to all four places.

    Args:
        ending: How the step ended.
        root: The store's URI; None where there is no plan.
        run_id: The run; None where there is no plan.
        ending_to: The file of KFP's output parameter; None outside KFP.

    Returns:
        As `write_to_store`.
    """
    # A signal has nothing to stop any more. It must not make the exit code another than the one that is written now.
    signals.ignore()
    # The store comes last: if it does not answer until the process is killed, the runtime has its line already.
    with contextlib.suppress(OSError, ValueError):
        # The line break, because what a library printed last may have had none.
        print(f"\n{endings.MARK}{ending.as_json(limit_bytes=_LINE_BYTES)}", flush=True)
    with contextlib.suppress(OSError):
        if TERMINATION_LOG.is_file():
            TERMINATION_LOG.write_text(ending.as_json(limit_bytes=_TERMINATION_LOG_BYTES), encoding="utf-8")
    with contextlib.suppress(OSError):
        if ending_to is not None:
            ending_to.parent.mkdir(parents=True, exist_ok=True)
            ending_to.write_text(ending.as_json(), encoding="utf-8")
    return root is None or run_id is None or write_to_store(root, run_id, ending)


def write_to_store(root: str, run_id: str, ending: Ending) -> bool:
    """Keep an ending in the run's folder; a store that fails or is slow loses it, and nothing else.

    Returns:
        Whether the write is over; False where a thread still waits for the store.
    """
    thread = threading.Thread(target=_upload, args=(root, run_id, ending), daemon=True)
    thread.start()
    thread.join(_STORE_SECONDS)
    return not thread.is_alive()


def _upload(root: str, run_id: str, ending: Ending) -> None:
    name = f"{ending.step}.json"
    with (
        contextlib.suppress(Exception),  # also a bug of ours or of a library: the step has ended
        tempfile.TemporaryDirectory(prefix="qlora-retrain-ending-", ignore_cleanup_errors=True) as temporary,
    ):
        (Path(temporary) / name).write_text(ending.as_json(limit_bytes=_LINE_BYTES), encoding="utf-8")
        open_store(root).upload(Path(temporary), _folder(run_id), [name])


def clear(store: Store, run_id: str, step_name: str) -> None:
    """Remove the ending of an earlier try, now that the step begins again.

    Raises:
        StoppedBySignal: If the step is asked to stop meanwhile; any other error is ignored.
    """
    try:
        # Otherwise the run's page would show the failure of an earlier try beside a step that runs.
        store.delete([f"{_folder(run_id)}/{step_name}.json"])
    except signals.StoppedBySignal:
        raise
    except (Problem, OSError):
        pass


def read(store: Store, run_id: str, step_name: str) -> Ending | None:
    """Return the newest ending of a step in a run; None where there is none, or where it cannot be read.

    Args:
        store: The store.
        run_id: The run.
        step_name: The step, or the name of task 0.
    """
    try:
        # A longer one is cut, and so no ending; no step wrote it.
        return endings.from_json(store.read_start(f"{_folder(run_id)}/{step_name}.json", _LINE_BYTES))
    except (NotFound, Problem):
        return None


def _folder(run_id: str) -> str:
    return f"runs/{run_id}/endings"
