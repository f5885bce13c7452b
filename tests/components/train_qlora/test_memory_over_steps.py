"""The memory of a training process does not grow with its steps, although their rows have other lengths each time."""

from __future__ import annotations

import json

import pytest

from qlora_retrain.lm import checkpoints

STEPS = 12
GROWTH_MIB = 96  # kernels until their caches are full, and fragments; without a bound it is 190, and goes on


@pytest.mark.soak
def test_memory_does_not_grow_over_steps_whose_rows_have_other_lengths(step, program) -> None:
    def lengthen(text: str) -> str:
        # 8 rows of a step have about the same length, and no two steps have the same.
        lines = text.splitlines(keepends=True)
        return "".join(line.replace("order", "order " + "now " * (i // 8 * 5 + i % 3)) for i, line in enumerate(lines))

    run = step(train=8 * STEPS, edit=lengthen)
    exit_code, _, stderr = program(
        run, precision="bfloat16", max_steps=STEPS, micro_batch_size=8, global_batch_size=8, checkpoint_minutes=1e6
    ).finish()
    assert exit_code == 0, stderr

    (checkpoint,) = checkpoints.sorted_checkpoints(run.scratch)
    log = json.loads((checkpoint / "state.json").read_text())["log"]
    tokens, memory_mib = ([entry[name] for entry in log] for name in ("tokens", "memory_mib"))
    assert len(set(tokens)) > STEPS // 2, "steps of the same sizes would show nothing"
    third = STEPS // 3
    growth_mib = max(memory_mib[-third:]) - max(memory_mib[:third])
    assert growth_mib < GROWTH_MIB, f"{growth_mib} MiB of growth: {memory_mib}"
