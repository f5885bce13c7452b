"""While a pod runs, the triggerer copies its log to the task's, with little of its progress."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest

from qlora_retrain.core import endings
from qlora_retrain.core.endings import Ending

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported


def test_the_triggerer_copies_every_text_and_progress_every_half_minute() -> None:
    from qlora_retrain.runtimes.airflow.pod_trigger import PodManager

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    log = logging.Logger("task")
    log.addHandler(Recorder())

    def line(second: int, text: str) -> str:
        return f"2026-01-31T03:{second // 60:02}:{second % 60:02}.123456789Z {text}"

    def progress(second: int) -> str:
        return line(second, json.dumps({"time": 1e6 + second, "what": "training", "done": second, "total": 100}))

    marked_ending = endings.MARK + Ending.from_exit_code("train_qlora", 0).as_json()
    chunks = [
        [line(0, "reading"), *map(progress, range(1, 50))],
        # The second that the last copy ended in is read again.
        [progress(49), *map(progress, range(50, 101)), line(101, "WARNING: slow"), line(102, marked_ending)],
    ]

    class Hook:
        async def read_logs(self, **_: object) -> list[str]:
            return chunks.pop(0)

    async def copy() -> None:
        manager = PodManager(async_hook=Hook())
        manager._log = log
        pod = SimpleNamespace(metadata=SimpleNamespace(name="p", namespace="n"))
        for _ in range(2):
            await manager.fetch_container_logs_before_current_sec(pod, container_name="base")

    asyncio.run(copy())
    assert messages == [
        "[base] reading",
        "[base] training: 1 of 100 (1 %)",
        "[base] training: 31 of 100 (31 %)",
        "[base] training: 61 of 100 (61 %)",
        "[base] training: 91 of 100 (91 %)",
        "[base] training: 100 of 100 (100 %)",
        "[base] WARNING: slow",
    ]
