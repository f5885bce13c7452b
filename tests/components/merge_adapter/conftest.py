"""What the merge step reads, after a real evaluation of the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from components.evaluate.step import run as evaluate
from qlora_retrain.config.sections import EvaluateConfig

RULES = EvaluateConfig(allow_first_release=True, bootstrap_samples=200, device="cpu", max_forgetting_nats=100.0)


@pytest.fixture
def inputs(
    tiny_model: Path, tiny_nf4: Path, tiny_adapter: Path, write_dataset: Callable[..., Path],
    write_reference: Callable[[Path], None], tmp_path: Path,
) -> dict[str, Path]:  # fmt: skip
    folders = {"base_model": tiny_model, "base_nf4": tiny_nf4, "adapter": tiny_adapter}
    # 12 golden rows, so that the rules about them have something to judge.
    dataset, evaluation, reference = write_dataset(tmp_path / "dataset", golden=12), tmp_path / "eva", tmp_path / "ref"
    evaluation.mkdir()
    reference.mkdir()
    write_reference(reference)

    evaluate(RULES, dataset, **folders, champion=None, anchor=None, golden_data=None, reference_data=reference,
             evaluation=evaluation)  # fmt: skip
    (tmp_path / "model").mkdir()
    artifacts = {"dataset": dataset, **folders, "evaluation": evaluation, "reference_data": reference}
    return {**artifacts, "model": tmp_path / "model"}
