"""A store under attack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, make_plan
from tests.attacks.attacker import Attacker


@pytest.fixture
def attacker(
    line: Path,
    root_uri: str,
    small_steps: dict[str, Callable[..., StepResult]],
    tmp_path: Path,
    node_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Attacker:
    """A store with keys after a whole run, whose attacker has done nothing yet."""
    first = make_plan.make_plan(line, root_uri)
    a = Attacker(line, root_uri, small_steps, tmp_path, first, node_cache, monkeypatch)
    a.run_until(a.first, "publish")
    assert execute.run_step(a.first, "publish", lambda: small_steps["publish"]).code == 0
    return a
