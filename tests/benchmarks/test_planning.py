"""What a plan predicts for the memory of a step is within 15 % of what torch allocates for it on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import planning
from benchmarks.planning import Case

MAX_ERROR = 0.15
# A case of each kind; the whole grid takes minutes.
FAST = (
    Case("llama", rows=6),
    Case("llama", rows=6, supervised_fraction=1.0, settings={"gradient_checkpointing": 1}),
    Case("llama", rows=2, length=500, settings={"rank": 64, "optimizer": "paged_adamw_8bit", "dropout": 0.0}),
    Case("llama", rows=6, settings={"target_modules": ["q_proj", "v_proj"], "precision": "float32"}),
    Case("vocabulary", rows=8, length=60),
    Case("gemma3", rows=4),
    Case("llama", rows=6, base_format="none"),
    Case("llama", rows=6, settings=planning.FULL, base_format="none"),
    Case("llama", rows=6, settings=planning.FULL | {"gradient_checkpointing": 1}, base_format="none"),
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def _check(case: Case, models: Path) -> None:
    predicted, measured = planning.predict(case), planning.measure(case, planning.stored_base(case, models))
    assert predicted.total == pytest.approx(sum(measured.values()), rel=MAX_ERROR)
    # The parts that do not depend on the rows alone, which have nothing to hide behind.
    assert predicted.weights == pytest.approx(measured["weights"], rel=0.01)
    assert predicted.adapter == measured["adapter"]
    assert predicted.optimizer == pytest.approx(measured["optimizer"], rel=0.01)
    changing = predicted.activations + predicted.logits + predicted.workspace
    assert changing == pytest.approx(measured["step"], rel=MAX_ERROR)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FAST, ids=lambda case: case.label)
def test_predicted_memory_is_what_torch_allocates(case: Case, models: Path) -> None:
    _check(case, models)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", planning.GRID, ids=lambda case: case.label)
def test_predicted_memory_is_what_torch_allocates_over_the_grid(case: Case, models: Path) -> None:
    _check(case, models)
