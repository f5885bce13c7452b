"""A search proposes points within the ranges, stops what is behind, and goes on where it was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lab.grid import points_of
from qlora_retrain.lab.runs import Outcome
from qlora_retrain.lab.search import Search, Trial, exclusive
from qlora_retrain.lab.variations import NamedSettings, Range, parse_variation

VARY = [
    parse_variation("train.learning_rate=1e-5..1e-2"),
    parse_variation("train.rank=4..64"),
    parse_variation("train.target_modules=all-linear,[q_proj,v_proj]"),
]
DONE, STOPPED = Outcome(0, ""), Outcome(75, "stopped", is_stopped=True)


def value_of(trial: Trial) -> float:
    """Return a value whose minimum is at a rate of 1e-3."""
    return abs(dict(trial.point.settings)["train.learning_rate"] - 1e-3)


def run(search: Search, count: int) -> list[Trial]:
    trials = []
    for _ in range(count):
        trials.append(search.propose())
        search.tell(trials[-1], DONE, value_of(trials[-1]))
    return trials


def test_a_range_is_read_and_a_grid_refuses_it() -> None:
    assert [variation.range for variation in VARY] == [Range(1e-5, 1e-2), Range(4, 64), None]
    assert [variation.range.is_logarithmic for variation in VARY[:2] if variation.range] == [True, True]
    assert not Range(0.0, 0.1).is_logarithmic
    with pytest.raises(UsageError, match=r"train.learning_rate=1e-05..0.01: a range is for --search"):
        points_of(VARY, None)
    for text in ("train.rank=4..", "train.rank=8..4", "train.rank=a..b", "train.rank=1..2..3", "train.rank=true..2"):
        with pytest.raises(UsageError, match=r"^--vary train.rank=.*expected LOW..HIGH"):
            parse_variation(text)


def test_points_lie_within_the_ranges_and_are_the_same_in_a_search_that_is_made_again(tmp_path: Path) -> None:
    trials = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        trials.append(run(Search(tmp_path / name, VARY, [], 1), 12))
    assert [trial.point for trial in trials[0]] == [trial.point for trial in trials[1]]
    settings = [dict(trial.point.settings) for trial in trials[0]]
    assert all(1e-5 <= values["train.learning_rate"] <= 1e-2 for values in settings)
    assert all(isinstance(values["train.rank"], int) and 4 <= values["train.rank"] <= 64 for values in settings)
    assert {str(values["train.target_modules"]) for values in settings} == {"all-linear", "['q_proj', 'v_proj']"}


def test_settings_with_names_are_one_more_choice(tmp_path: Path) -> None:
    named = [NamedSettings("a", (("train.method", "lora"),)), NamedSettings("b", (("train.method", "dora"),))]
    search = Search(tmp_path, VARY[:1], named, 1)
    assert {trial.point.named.name for trial in run(search, 8) if trial.point.named} == {"a", "b"}


def test_a_run_that_is_behind_the_others_is_stopped_after_enough_of_them(tmp_path: Path) -> None:
    search = Search(tmp_path, VARY, [], 1)
    for _ in range(4):
        trial = search.propose()
        assert [trial.is_hopeless(loss) for loss in (2.0, 1.0)] == [False, False]
        search.tell(trial, DONE, 1.0)
    ahead, behind = search.propose(), search.propose()
    assert not ahead.is_hopeless(1.9)
    assert behind.is_hopeless(2.1)
    search.tell(behind, STOPPED, None)
    search.tell(ahead, DONE, 0.9)
    assert search.num_ended == 6
    # The report lists the run that was stopped, also where the search goes on from it.
    again = Search(tmp_path, VARY, [], 1)
    assert [outcome.code for _, outcome in again.ended_points()] == [0, 0, 0, 0, 0, 75]
    assert again.ended_points()[-1] == (behind.point, STOPPED)


def test_a_search_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    search = Search(tmp_path, VARY, [], 1)
    done = run(search, 2)
    interrupted = search.propose().point

    again = Search(tmp_path, VARY, [], 1)
    assert again.num_ended == 2
    assert again.ended_points() == [(trial.point, DONE) for trial in done]
    assert again.propose().point == interrupted


def test_a_search_with_more_trials_proposes_other_points(tmp_path: Path) -> None:
    points = [trial.point for _ in range(4) for trial in run(Search(tmp_path, VARY, [], 1), 1)]
    assert len(set(map(str, points))) == 4


def test_what_cannot_be_run_or_gave_no_number_counts_as_a_trial(tmp_path: Path) -> None:
    search = Search(tmp_path, VARY, [], 1)
    refused, diverged = search.propose(), Outcome(14, "diverged")
    search.refuse(refused, "the line says no")
    search.tell(search.propose(), diverged, None)
    search.tell(search.propose(), DONE, float("nan"))
    for again in (search, Search(tmp_path, VARY, [], 1)):
        assert again.num_ended == 3
        assert [outcome for _, outcome in again.ended_points()] == [diverged, DONE]
        assert again.refused_points() == {refused.point.label: "the line says no"}


def test_what_failed_for_a_reason_that_may_be_gone_is_run_again_by_the_next_search(tmp_path: Path) -> None:
    search = Search(tmp_path, VARY, [], 1)
    failed = search.propose()
    search.tell(failed, Outcome(75, "the disk is full"), None)
    assert search.num_ended == 1
    for _ in range(2):  # a failure that comes back is proposed once each time
        search = Search(tmp_path, VARY, [], 1)
        assert search.num_ended == 0
        trial = search.propose()
        assert trial.point == failed.point
        search.tell(trial, Outcome(75, "the disk is full"), None)
    Search(tmp_path, VARY, [], 1)  # stopped before it proposed anything
    search = Search(tmp_path, VARY, [], 1)
    search.tell(search.propose(), DONE, 1.0)
    search = Search(tmp_path, VARY, [], 1)
    assert search.ended_points() == [(failed.point, DONE)]
    assert search.propose().point != failed.point


def test_a_folder_has_one_search_at_a_time(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path),
        pytest.raises(UsageError, match="another search is running in this folder"),
        exclusive(tmp_path),
    ):
        pass
    with exclusive(tmp_path):
        pass


def test_a_study_whose_last_line_was_cut_off_goes_on_without_it(tmp_path: Path) -> None:
    points = [trial.point for trial in run(Search(tmp_path, VARY, [], 1), 2)]
    path = tmp_path / "study.log"
    path.write_bytes(path.read_bytes()[:-9])
    search = Search(tmp_path, VARY, [], 1)
    # The last line said how the second trial ended, so it is proposed again.
    assert search.num_ended == 1
    assert search.propose().point == points[1]


@pytest.mark.parametrize("text", ["garbage\n", '{"op_code": 0}\n', "[1]\n"])
def test_a_damaged_study_is_refused_with_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.log").write_text(text)
    with pytest.raises(
        UsageError, match=r"study.log: is damaged, or no study .*; remove it, and the search begins anew"
    ):
        Search(tmp_path, VARY, [], 1)


def test_a_search_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(Search(tmp_path, VARY, [], 1), 1)
    with pytest.raises(UsageError, match="is a search of other settings; name another folder with --out"):
        Search(tmp_path, VARY[:1], [], 1)
