"""A lab through its command line, on a tiny random model: stopped, killed, finished, and begun again."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.core import json_lines
from tests.e2e.test_pipeline import manifests

pytestmark = pytest.mark.slow
VARY = ("--vary", "train.rank=2,8", "--judge-fraction", "0.2")


def arguments(project, *options: object) -> tuple[object, ...]:  # type: ignore[no-untyped-def]
    return ("lab", project.config, "--root", project.root, *VARY, "--out", project.folder / "lab", "--json", *options)


def texts(project, manifest: str, name: str) -> set[str]:  # type: ignore[no-untyped-def]
    """Return what the users say in a file of a data set."""
    attempt = manifests(project)[manifest]
    path = project.folder / "store/artifacts" / Path(manifest).parent / attempt / name
    rows = [row for _, row in json_lines.read(path)]
    return {row["messages"][1]["content"] for row in rows}


def stop_once(project, artifact: str, stop: Callable[[int], None]) -> tuple[int, dict[str, str]]:  # type: ignore[no-untyped-def]
    """Start a lab, stop it once the store has an artifact of that name, and return its exit code and what it made."""
    with project.start(*arguments(project)) as process:
        deadline = time.monotonic() + 500
        while not any(path.startswith(f"{artifact}/") for path in manifests(project)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stop(process.pid)
        process.communicate(timeout=500)
    return process.returncode, manifests(project)


@pytest.fixture(scope="module")
def lab(make_project: Callable, kill_tree: Callable[[int], None]):  # type: ignore[no-untyped-def]
    """A lab that was stopped by Ctrl-C, begun again, killed, and begun again."""
    project = make_project(rows=240, train={"epochs": 2}, evaluate={"bootstrap_samples": 200, "stop_rows": 10})
    code, after_stop = stop_once(project, "base_nf4", lambda pid: os.kill(pid, signal.SIGINT))
    assert code == 130
    _, after_kill = stop_once(project, "adapter", kill_tree)
    result = project.cli(*arguments(project))
    assert result.exit_code == 0, result.text
    assert after_stop.items() <= after_kill.items() <= manifests(project).items(), "something was made twice"
    return project, result


def test_a_lab_measures_every_point_and_says_which_to_take(lab) -> None:
    project, result = lab
    document = json.loads((project.folder / "lab" / "lab.json").read_text())
    assert json.loads(result.out) == document
    assert {point["label"] for point in document["points"]} == {"rank 2", "rank 8"}
    assert document["recommendation"]["sentence"] in (project.folder / "lab" / "report.html").read_text()

    small, large = sorted(document["points"], key=lambda point: point["adapter_bytes"])
    assert large["trainable_parameters"] == 4 * small["trainable_parameters"]
    assert all(point["tokens_per_second"] > 0 and point["peak_memory_mib"] > 0 for point in document["points"])
    # One line for each point at least, and none of them on the standard output.
    assert "1/2 rank 2: " in result.err
    assert "2/2 rank 8: " in result.err


def test_a_second_lab_does_nothing(lab) -> None:
    project, _ = lab
    files = {path: path.stat().st_mtime_ns for path in (project.folder / "store").rglob("*") if path.is_file()}
    report = (project.folder / "lab" / "report.html").read_text()
    again = project.cli(*arguments(project))
    assert again.exit_code == 0, again.text
    assert again.err.count(": done before") == 3
    assert {path: path.stat().st_mtime_ns for path in (project.folder / "store").rglob("*") if path.is_file()} == files
    assert (project.folder / "lab" / "report.html").read_text() == report


def test_a_point_that_fails_is_listed_and_stops_no_other_and_equal_points_are_computed_once(lab) -> None:
    project, _ = lab
    before = manifests(project)
    # The second pattern is left no layer, which the step that trains says.
    vary = ("--vary", "train.rank=2", "--vary", 'train.rank_pattern={},{q_proj: 2, ".*q_proj": 4}')
    options = ("--judge-fraction", "0.2", "--parallel", "2", "--out", project.folder / "other")
    result = project.cli("lab", project.config, "--root", project.root, *vary, *options)
    assert result.exit_code == 0, result.text
    assert manifests(project) == before
    document = json.loads((project.folder / "other" / "lab.json").read_text())
    assert [point["label"] for point in document["points"]] == ["rank 2, rank_pattern {}"]
    [failed] = document["failed"]
    assert failed["label"] == 'rank 2, rank_pattern {"q_proj": 2, ".*q_proj": 4}'
    assert failed["exit_code"] == 12
    assert "'.*q_proj' matches no adapted layer that an earlier pattern leaves" in failed["message"]


def test_the_line_itself_is_untouched_and_its_own_evaluation_is_never_seen(lab) -> None:
    project, _ = lab
    store = project.folder / "store"
    assert not (store / "models").exists()
    assert not (store / "histories").exists()

    [lab_data] = (path for path in manifests(project) if path.startswith("dataset/"))
    before = manifests(project)
    line = project.run("--until", "validate_data")
    assert line.exit_code == 0, line.text
    [line_data] = (path for path in manifests(project) if path.startswith("dataset/") and path not in before)
    own_evaluation, own_training = (texts(project, line_data, f"{side}.jsonl") for side in ("eval", "train"))
    judged, trained = (texts(project, lab_data, f"{side}.jsonl") for side in ("eval", "train"))
    assert judged
    assert judged | trained <= own_training
    assert not judged & trained
    assert not (judged | trained) & own_evaluation
    # The same 4-bit base serves both.
    plan = project.cli("plan", project.config, "--root", project.root).out
    assert len([line for line in plan.splitlines() if "made already: done" in line]) == 2


def test_a_share_that_is_too_small_to_judge_by_is_refused_once_for_all_points(lab) -> None:
    project, _ = lab
    result = project.cli(
        "lab", project.config, "--root", project.root, "--vary", "train.rank=2,8", "--judge-fraction", "0.01",
        "--out", project.folder / "small",
    )  # fmt: skip
    assert result.exit_code == 10, result.text
    assert "a larger share gives more prompts to judge by" in result.err
    assert "rank 2" not in result.err


@pytest.mark.soak
def test_methods_of_every_kind_are_compared(make_project: Callable) -> None:  # type: ignore[type-arg]
    project = make_project(rows=240, train={"max_steps": 4}, evaluate={"bootstrap_samples": 200, "base_rows": 30})
    points = project.folder / "points.yaml"
    points.write_text(
        "lora: {train.method: lora}\nall weights: {train.method: full, quantize.format: none}\n"
        "prompt: {train.method: prompt}\nscales: {train.method: ia3}\n"
    )
    result = project.cli(
        "lab", project.config, "--root", project.root, "--points", points, "--merge", "--judge-fraction", "0.2",
        "--out", project.folder / "lab", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.text
    document = json.loads(result.out)
    # Four steps may teach too little to merge anything; all points are measured all the same.
    assert {entry["exit_code"] for entry in document["failed"]} <= {11}
    sizes = {point["label"]: point["adapter_bytes"] for point in document["points"]}
    assert set(sizes) == {"lora", "all weights", "prompt", "scales"}
    assert max(sizes, key=lambda name: sizes[name]) == "all weights"


@pytest.mark.soak
def test_a_search_tries_points_and_goes_on_with_more(make_project: Callable) -> None:  # type: ignore[type-arg]
    project = make_project(rows=240, train={"max_steps": 4, "num_evals": 2}, evaluate={"bootstrap_samples": 200})
    command = ("lab", project.config, "--root", project.root, "--out", project.folder / "lab", "--json")
    search = ("--search", "optuna", "--vary", "train.learning_rate=1e-4..1e-2", "--vary", "train.rank=2,4")
    first = project.cli(*command, *search, "--trials", 2)
    assert first.exit_code == 0, first.text
    assert len(json.loads(first.out)["points"]) == 2
    before = manifests(project)
    second = project.cli(*command, *search, "--trials", 3, "--parallel", 2)
    assert second.exit_code == 0, second.text
    assert len(json.loads(second.out)["points"]) == 3
    assert before.items() <= manifests(project).items(), "something was made twice"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--search", "optuna"), "nothing to search"),
        (("--search", "optuna", "--vary", "train.rank=2..8", "--seeds", "2"), "a search compares single runs"),
        (("--trials", "3", "--vary", "train.rank=2,8"), "is for a search"),
        (("--vary", "train.rank=2..8"), "a range is for --search"),
    ],
)
def test_options_of_another_mode_are_refused(make_project: Callable, options: tuple[str, ...], message: str) -> None:  # type: ignore[type-arg]
    project = make_project(rows=60)
    result = project.cli("lab", project.config, "--root", project.root, *options)
    assert result.exit_code == 12, result.text
    assert message in result.err
