"""Check the drift of a data set's distributions: the index, the part that chance explains, and the limit."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.evaluation import drift


def test_the_index_is_the_sum_over_categories() -> None:
    (label_drift,) = drift.compute_drift({"label": {"a": 900, "b": 100}}, {"label": {"a": 600, "b": 400}}, 0.95)
    # Labels a and b: from 90 % and 10 % to 60 % and 40 %.
    expected = (0.6 - 0.9) * math.log(0.6 / 0.9) + (0.4 - 0.1) * math.log(0.4 / 0.1)
    assert label_drift.psi == pytest.approx(expected, rel=0.01)  # half a row is added to each category
    assert 0 < label_drift.psi_beyond_chance < label_drift.psi
    assert label_drift.shifts[0][0] == "b"


def test_chance_alone_passes_as_often_as_it_should() -> None:
    """Two samples of one population with many categories often exceed 0.1, and rarely beyond what chance explains."""
    generator = random.Random(0)
    categories, above, beyond = [str(i) for i in range(20)], 0, 0
    for _ in range(300):
        before, now = (dict(Counter(generator.choices(categories, k=250))) for _ in range(2))
        (label_drift,) = drift.compute_drift({"label": before}, {"label": now}, 0.95)
        above += label_drift.psi > 0.1
        beyond += label_drift.psi_beyond_chance > 0
    # 0.1 is the usual mark for "some drift"; a plain limit would refuse most of these.
    assert above / 300 > 0.5
    assert beyond / 300 < 0.08


def test_chance_has_more_to_say_where_prompts_have_several_rows(tmp_path: Path) -> None:
    """Eight rows of one length a prompt differ between two samples as much as one row a prompt would."""
    generator = random.Random(1)
    categories, by_prompt, by_row = [str(i) for i in range(20)], 0, 0
    for _ in range(200):
        before, now = (
            {name: 8 * n for name, n in Counter(generator.choices(categories, k=250)).items()} for _ in range(2)
        )
        (length_drift,) = drift.compute_drift({"length": before}, {"length": now}, 0.95, (250, 250))
        by_prompt += length_drift.psi_beyond_chance > 0
        (length_drift,) = drift.compute_drift({"length": before}, {"length": now}, 0.95)
        by_row += length_drift.psi_beyond_chance > 0
    assert by_prompt / 200 < 0.08
    assert by_row / 200 > 0.9

    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"prompts": {"train": 200, "eval": 50, "golden": 3}}))
    assert drift.read_prompts(path) == 250
    path.write_text("{}")
    assert drift.read_prompts(path) is None


@pytest.mark.parametrize("degrees", [2, 5, 20, 76])
def test_the_quantile_agrees_with_scipys(degrees: int) -> None:
    from scipy.stats import chi2

    assert drift._chi_squared_quantile(degrees, 0.95) == pytest.approx(chi2.ppf(0.95, degrees), rel=0.02)


def test_the_limit_refuses_certain_drift_and_nothing_less() -> None:
    moved = drift.compute_drift({"language": {"latin": 500}}, {"language": {"latin": 250, "cyrillic": 250}}, 0.95)
    text, passed = drift.check_limit(moved, 0.25, "the champion's data")
    assert passed is False
    assert "language moved most" in text
    assert "cyrillic" in text

    # A third of the rows moved, but of three rows: chance explains that.
    few = drift.compute_drift({"language": {"latin": 3}}, {"language": {"latin": 2, "cyrillic": 1}}, 0.95)
    assert drift.check_limit(few, 0.25, "x")[1] is True


def test_a_profile_without_distributions_is_no_evidence(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"rows": {}}')
    assert drift.read_distributions(path) is None
    text, passed = drift.check_limit(None, 0.25, "the champion's data")
    assert passed is None
    assert "max_drift_psi: null" in text

    path.write_text(json.dumps({"distributions": {"label": {"a": 1}}}))
    assert drift.read_distributions(path) == {"label": {"a": 1}}

    path.write_text("[")
    with pytest.raises(IntegrityError, match=r"profile\.json"):
        drift.read_distributions(path)
