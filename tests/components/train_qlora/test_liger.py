"""liger-kernel's Triton kernels in place of torch's operations, run by Triton's interpreter, so without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.train_qlora import liger
from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline.code_identity import project_root

LIGER = project_root() / ".state" / "liger"


def test_liger_kernels_have_the_loss_and_the_gradients_of_torch(nf4: Path) -> None:
    if not (LIGER / "liger_kernel").is_dir():
        message = "liger-kernel is not installed: make liger-setup"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)

    environment = os.environ | {"PYTHONPATH": f"{project_root()}:{LIGER}"}
    program = Path(__file__).with_name("interpreted.py")
    process = subprocess.run([sys.executable, program, nf4], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr

    # A JSON line without gradient checkpointing, then one with it.
    plain, checkpointed = (json.loads(line) for line in process.stdout.splitlines())
    for result in (plain, checkpointed):
        assert result["losses"][1] == pytest.approx(result["losses"][0], rel=1e-5)
        assert result["num_gradients"] == 28
        assert result["max_relative_difference"] < 1e-5
        assert result["kernel_runs"][0] == 0

    # Each recomputed output and each backward pass is one more run of a kernel.
    norms, mlps = 5, 2  # of two layers, and the last norm
    forwards, recomputations, backwards = norms + mlps, norms - 1 + mlps, norms - 1 + mlps
    assert plain["kernel_runs"][1] == forwards + recomputations + backwards, (
        "the last norm's output is kept; the first norm has no gradient"
    )
    layers = norms - 1 + mlps
    assert checkpointed["kernel_runs"][1] == plain["kernel_runs"][1] + layers + 1, (
        "layers are computed twice; the first norm has a gradient"
    )


def test_liger_that_is_not_installed_is_refused(step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "IS_INSTALLED", False)
    with pytest.raises(UsageError, match="liger-kernel is not installed where the step runs"):
        step()(kernels="liger", device="cuda")
