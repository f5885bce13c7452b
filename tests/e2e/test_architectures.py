"""Tiny models of many architectures through the plan's check and the steps, each result computed a second way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.architectures.catalogue import ARCHITECTURES, SHORT_REASONS, Architecture
from tests.e2e.architectures.table import HEADINGS, code
from tests.e2e.architectures.trial import COLUMNS, run_trial

# One each of what took most to carry through: windows, attention that cannot be packed, names without the body's.
SHORT_FORM = ("Gemma3ForCausalLM", "NemotronForCausalLM", "BloomForCausalLM")


def expected_cells(item: Architecture) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, "yes") | {"packs": item.packs, "gguf": item.gguf}


def check(item: Architecture, folder: Path, attention: str) -> None:
    cells = run_trial(item, folder, attention=attention)
    if item.refusal:
        assert list(cells) == ["plan"]
        assert cells["plan"].startswith("refused (12): sources.base_model: ")
        assert item.refusal in cells["plan"]
    else:
        assert cells == expected_cells(item)


@pytest.mark.parametrize("name", SHORT_FORM)
def test_an_architecture_is_carried_through(name: str, tmp_path: Path) -> None:
    check(ARCHITECTURES[name], tmp_path / "trial", "sdpa")


def test_the_page_has_the_table_that_these_tests_hold_true() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "compatibility.md").read_text()
    missing = [row for item in ARCHITECTURES.values() if (row := expected_row(item)) not in page]
    assert missing == []


def expected_row(item: Architecture) -> str:
    cells = [SHORT_REASONS[item.refusal]] if item.refusal else [expected_cells(item)[column] for column in HEADINGS]
    return f"\n| {code(item.name)} | {item.models} | {' | '.join(cells)} |\n"


@pytest.mark.soak
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_carried_through_or_refused_by_the_plan(
    name: str, attention: str, tmp_path: Path
) -> None:
    check(ARCHITECTURES[name], tmp_path / "trial", attention)
