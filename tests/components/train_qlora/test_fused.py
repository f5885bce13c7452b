"""liger-kernel's Triton kernels in place of torch's operations, run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.train_qlora import fused
from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline.code_identity import project_root

LIGER = project_root() / ".state" / "liger"


def test_liger_kernels_give_the_loss_and_the_gradients_of_torch(nf4: Path) -> None:
    if not (LIGER / "liger_kernel").is_dir():
        missing = "liger-kernel is not installed: make liger-setup"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    environment = os.environ | {"PYTHONPATH": f"{project_root()}:{LIGER}"}
    program = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, program, nf4], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain, checkpointed = (json.loads(line) for line in done.stdout.splitlines())
    for found in (plain, checkpointed):
        assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-5)
        assert found["gradients"] == 28
        assert found["furthest"] < 1e-5
        assert found["ran"][0] == 0
    norms, gates = 5, 2  # of two layers, and the last norm
    forwards, again, backwards = norms + gates, norms - 1 + gates, norms - 1 + gates
    assert plain["ran"][1] == forwards + again + backwards, "the last norm's output is kept; the first has no gradient"
    layers = norms - 1 + gates
    assert checkpointed["ran"][1] == plain["ran"][1] + layers + 1, "layers twice; the first norm has a gradient"


def test_liger_that_is_not_installed_is_refused(step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "INSTALLED", False)
    with pytest.raises(UsageError, match="liger-kernel is not installed where the step runs"):
        step()(kernels="liger", device="cuda")
