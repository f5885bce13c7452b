"""With a vocabulary of 262,144 tokens a step takes the memory of a chunk of logits, and copies no output layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from components.train_qlora import loss
from tests.components.train_qlora.peak_of_a_step import NUM_ROWS, VOCABULARY, WIDTH
from tests.zygote import Zygote


@pytest.mark.parametrize("kind", ["packed", "padded", "scaled"])
def test_a_step_takes_the_memory_of_a_chunk_of_logits_and_copies_no_output_layer(zygote: Zygote, kind: str) -> None:
    program = str(Path(__file__).with_name("peak_of_a_step.py"))
    process = zygote.popen([sys.executable, program, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    # A chunk in fp32, half of that in bf16 for the gradient, and what one layer needs.
    limit_mib = 1.5 * loss.CHUNK_BYTES["cpu"] / 2**20 + 60
    assert float(stdout) < limit_mib
    assert limit_mib < NUM_ROWS * VOCABULARY * WIDTH * 2 / 2**20, "one output layer for each row would be noticed"
