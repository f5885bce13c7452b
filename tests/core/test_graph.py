"""The graph as data: what the orchestrators, the plan and the documentation loop over."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from qlora_retrain.config.line import LineConfig
from qlora_retrain.core import graph, graph_text


def test_the_edges_are_those_of_the_design() -> None:
    assert set(graph.edges()) == {
        ("validate_data", "train_qlora"),
        ("quantize_model", "train_qlora"),
        ("validate_data", "evaluate"),
        ("quantize_model", "evaluate"),
        ("train_qlora", "evaluate"),
        ("validate_data", "merge_adapter"),
        ("quantize_model", "merge_adapter"),
        ("train_qlora", "merge_adapter"),
        ("evaluate", "merge_adapter"),
        ("validate_data", "publish"),
        ("train_qlora", "publish"),
        ("evaluate", "publish"),
        ("merge_adapter", "publish"),
    }


def test_steps_come_after_what_they_read() -> None:
    names = [s.name for s in graph.STEPS]
    assert all(names.index(up) < names.index(down) for up, down in graph.edges())


def test_every_input_is_a_source_or_the_artifact_of_exactly_one_step() -> None:
    artifacts = [s.makes for s in graph.STEPS]
    sources = [s.name for s in graph.SOURCES]
    assert len(set(artifacts + sources)) == len(artifacts) + len(sources)
    assert {i.name for s in graph.STEPS for i in s.reads} <= set(artifacts + sources)


def test_no_step_before_evaluate_depends_on_the_champion() -> None:
    before = {s.name for s in graph.STEPS if s.makes in ("dataset", "base_nf4", "adapter")}
    assert not any(i.name == "champion" for s in graph.STEPS if s.name in before for i in s.reads)
    assert all(up in before for up, down in graph.edges() if down in before)


def test_every_step_has_a_section_of_the_config() -> None:
    assert {s.section for s in graph.STEPS} <= set(LineConfig.model_fields)


def test_the_step_of_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        graph.step("train")


@pytest.mark.parametrize("text", [graph_text.as_text(), graph_text.as_mermaid()])
def test_the_graph_as_text_names_every_step_and_artifact(text: str) -> None:
    assert all(s.name in text and (s.makes in text or s.name == "publish") for s in graph.STEPS)


def test_the_graph_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(graph.__file__).read_text())
    imported = {
        (node.module or "").partition(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= sys.stdlib_module_names
