"""How a container's exit code is read, with and without an ending of the step."""

from __future__ import annotations

import pytest

from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause
from qlora_retrain.runtimes.docker.container_ending import read_ending

SAVED = Ending(75, Cause.PREEMPTED, "saved at step 399", "train_qlora")


def test_a_container_that_its_engine_lost_is_tried_again() -> None:
    ending = read_ending("train_qlora", 255, None, "step 412")
    assert ending.retry
    assert ending.cause == Cause.NODE_LOST
    assert ending.summary() == (
        "try again (75): the engine lost the container (exit code 255), as when it or its machine restarts; last "
        "output: step 412"
    )


@pytest.mark.parametrize(
    ("exit_code", "step_ending", "summary"),
    [
        (75, SAVED, "try again (75): saved at step 399"),
        (
            137,
            None,
            "out of memory (137): killed, probably for its memory (limit: runtime.memory_gib is 8); last output: "
            "step 412",
        ),
        (1, None, "internal error (1): step 412"),
        (0, None, "done (0): step 412"),
    ],
)
def test_any_other_exit_code_stands(exit_code: int, step_ending: Ending | None, summary: str) -> None:
    ending = read_ending("train_qlora", exit_code, step_ending, "step 412", "runtime.memory_gib is 8")
    assert ending.summary() == summary
