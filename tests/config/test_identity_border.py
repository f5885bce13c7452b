"""The config package is not hashed, so nothing that it computes may reach a result.

A step's key holds the fields of its section and the hash of its code: its folder, `lm/` and `evaluation/`. A property
of a config model would be in neither: with another formula the same key would name another artifact.
"""

from __future__ import annotations

import ast
import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_retrain.config.fields import Section
from qlora_retrain.config.line import section_model
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import graph
from qlora_retrain.pipeline import code_identity

STEPS = [step.name for step in graph.STEPS]
STEP_MODELS = sorted({section_model(step.section) for step in graph.STEPS}, key=lambda model: model.__name__)
# What hashed code may call on a section, and why that changes no result.
ALLOWED = {
    "identity": "makes the key itself",
    "operational_fields": "says which fields stay out of the key",
    "with_reasons": "attaches sentences for reports",
    "reasons": "sentences for reports; no number is computed from them",
}


def hashed_files() -> Iterator[Path]:
    root = code_identity.project_root()
    for step in STEPS:
        yield from (root / "components" / step).rglob("*.py")
    for package in code_identity.HASHED_PACKAGES:
        yield from (root / "src" / "qlora_retrain" / package).rglob("*.py")


def public_members(model: type) -> set[str]:
    """Methods, properties and class attributes that the class itself defines; pydantic's own are not among them."""
    return {name for name in vars(model) if not name.startswith("_") and not name.startswith("model_")}


@pytest.mark.parametrize("model", STEP_MODELS, ids=lambda model: model.__name__)
def test_the_section_of_a_step_holds_fields_and_validators_only(model: type[Section]) -> None:
    computed = {name for cls in model.__mro__ if issubclass(cls, Section) for name in public_members(cls)}
    assert computed <= set(ALLOWED)
    assert not model.model_computed_fields


def test_hashed_code_takes_nothing_but_the_steps_sections_from_the_config() -> None:
    for path in hashed_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("qlora_retrain.config") for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qlora_retrain.config"):
                module = importlib.import_module(str(node.module))
                imported = [getattr(module, alias.name) for alias in node.names]
                assert all(value in STEP_MODELS for value in imported), f"{path} imports {ast.unparse(node)}"


def copied_tree(folder: Path) -> Path:
    """A copy of what code identity looks at."""
    root = code_identity.project_root()
    ignored = shutil.ignore_patterns("__pycache__", "*.md")
    for part in ("components", "src"):
        shutil.copytree(root / part, folder / part, ignore=ignored)
    shutil.copy(root / "constraints.txt", folder)
    return folder


def test_another_formula_for_a_derived_size_changes_the_identity_of_training(tmp_path: Path) -> None:
    before, after = copied_tree(tmp_path / "before"), copied_tree(tmp_path / "after")
    batching = after / "components/train_qlora/batching.py"
    formula = "return min(micro_batch_size(config), rows_per_process)"
    assert formula in batching.read_text()
    batching.write_text(batching.read_text().replace(formula, formula.replace("return", "return 2 *")))
    changed = {step for step in STEPS if code_identity.code_hash(step, before) != code_identity.code_hash(step, after)}
    assert changed == {"train_qlora"}


def test_another_global_batch_size_changes_the_key_of_training() -> None:
    assert TrainConfig(global_batch_size=32).identity() != TrainConfig(global_batch_size=16).identity()
