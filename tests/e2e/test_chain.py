"""A line whose versions form a chain: each starts from the one before, with replay rows, and tries their average."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core import json_lines
from tests.conftest import write_jsonl


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.soak
@pytest.mark.slow
def test_a_second_version_goes_on_from_the_first_and_is_averaged_with_it_where_that_is_better(
    make_project: Callable, write_tickets: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    project = make_project(
        rows=240,
        train={"start": "champion", "epochs": 6},
        merge={"soup": 3, "base": "measured"},
        evaluate={"max_loss_to_champion": 0.5, "min_gain_over_base": 0.0},
        data={"replay_fraction": 0.1},
        sources={"replay_data": "general.jsonl"},
    )
    general = [
        {"messages": [{"role": "user", "content": f"Name {n} stars."}, {"role": "assistant", "content": f"Star {n}"}]}
        for n in range(60)
    ]
    write_jsonl(project.folder / "general.jsonl", general)
    first = project.run()
    assert first.exit_code == 0, first.text
    assert "start: a new adapter over the base, since the line has no version in production yet" in first.out
    assert "soup: none: the line has no version that fits" in first.out
    again = project.run()
    assert again.exit_code == 0, again.text
    assert "unchanged: production is already" in again.out

    write_tickets(project.folder / "tickets.jsonl", 300)
    second = project.run("--set", "train.epochs=1")
    assert second.exit_code == 0, second.text
    assert "training goes on from the adapter in production" in second.out
    pulled = {}
    for version in sorted((project.folder / "store/models/tiny/versions").iterdir()):
        pulled[version.name] = tmp_path / version.name
        assert (
            project.cli("pull", f"tiny@{version.name}", tmp_path / version.name, "--root", project.root).exit_code == 0
        )
    (v1, folder1), (_, folder2) = pulled.items()

    recipe = read(folder2, "recipe.json")
    assert recipe["start"]["version"] == v1
    assert [adapter["version"] for adapter in recipe["earlier_adapters"]] == [v1]
    assert f"from the adapter of {v1} on" in (folder2 / "README.md").read_text()
    # It begins where the first version ended.
    losses = [[row["loss"] for _, row in json_lines.read(f / "training/loss.jsonl")] for f in (folder1, folder2)]
    assert losses[1][0] < 0.5 * losses[0][0]
    assert [read(f, "training/training.json")["start"] for f in (folder1, folder2)] == ["base", "champion"]
    # The average of both was tried, and ships only where it is better.
    candidates = {c["form"]: c for c in read(folder2, "evaluation/certificate.json")["candidates"]}
    mean = next(c for form, c in candidates.items() if "soup of 2" in form)
    own = candidates[mean["base"]]
    assert mean["ships"] == (mean["loss"] < own["loss"])
    replayed = read(folder2, "data/profile.json")["replay"]
    assert 0.08 < replayed["fraction"] < 0.12
    assert replayed["beyond_fraction"] > 0
