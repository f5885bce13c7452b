"""Read how a container ended, from its exit code and from the ending that the step wrote."""

from __future__ import annotations

import dataclasses

from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause, Exit

# Engines report it of a container whose end they did not see, as after a restart of the machine. No step returns it.
UNKNOWN_EXIT_CODE = 255


def read_ending(
    step: str, exit_code: int, step_ending: Ending | None, last_lines: str, memory_limit: str = "the machine's"
) -> Ending:
    """Return the ending of the step that ran in a container.

    Args:
        step: The step.
        exit_code: The container's exit code.
        step_ending: The ending that the step wrote; None where it was killed before.
        last_lines: The end of the step's other output.
        memory_limit: What the container's memory was limited by, in words.
    """
    if exit_code == UNKNOWN_EXIT_CODE:
        reason = "the engine lost the container (exit code 255), as when it or its machine restarts"
        reason = "; last output: ".join(filter(None, (reason, last_lines)))
        return Ending.from_exit_code(step, Exit.TRY_AGAIN, reason, cause=Cause.NODE_LOST)

    ending = Ending.from_process(step, exit_code, step_ending, last_lines)
    if exit_code == Exit.OUT_OF_MEMORY and step_ending is None:
        # Engines report no reason for 137. If the step wrote no ending, it was most likely killed for memory.
        reason = f"killed, probably for its memory (limit: {memory_limit}); last output: {last_lines}"
        return dataclasses.replace(ending, reason=reason)
    return ending
