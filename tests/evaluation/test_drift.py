"""Drift of a data set's distributions: the index, what chance makes of it, the rule."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.evaluation import drift


def test_the_index_is_the_sum_over_kinds() -> None:
    (found,) = drift.measure({"label": {"a": 900, "b": 100}}, {"label": {"a": 600, "b": 400}}, 0.95)
    expected = (0.6 - 0.9) * math.log(0.6 / 0.9) + (0.4 - 0.1) * math.log(0.4 / 0.1)
    assert found.psi == pytest.approx(expected, rel=0.01)  # half a row is added to each kind
    assert 0 < found.low < found.psi
    assert found.moved[0][0] == "b"


def test_chance_alone_passes_as_often_as_it_should() -> None:
    """Pairs of samples of one population with many kinds: the index is often above 0.1, what is left rarely above 0."""
    draw = random.Random(0)
    kinds, above, beyond = [str(i) for i in range(20)], 0, 0
    for _ in range(300):
        before, now = (dict(Counter(draw.choices(kinds, k=250))) for _ in range(2))
        (found,) = drift.measure({"label": before}, {"label": now}, 0.95)
        above += found.psi > 0.1
        beyond += found.low > 0
    assert above / 300 > 0.5
    assert beyond / 300 < 0.08


@pytest.mark.parametrize("degrees", [2, 5, 20, 76])
def test_the_quantile_agrees_with_scipys(degrees: int) -> None:
    from scipy.stats import chi2

    assert drift._chi_squared(degrees, 0.95) == pytest.approx(chi2.ppf(0.95, degrees), rel=0.02)


def test_the_rule_refuses_sure_drift_and_nothing_less() -> None:
    moved = drift.measure({"language": {"latin": 500}}, {"language": {"latin": 250, "cyrillic": 250}}, 0.95)
    text, passed = drift.judge(moved, 0.25, "the champion's data")
    assert passed is False
    assert "language moved most" in text
    assert "cyrillic" in text
    few = drift.measure({"language": {"latin": 3}}, {"language": {"latin": 2, "cyrillic": 1}}, 0.95)
    assert drift.judge(few, 0.25, "x")[1] is True


def test_a_profile_without_distributions_is_no_evidence(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"rows": {}}')
    assert drift.distributions(path) is None
    text, passed = drift.judge(None, 0.25, "the champion's data")
    assert passed is None
    assert "max_drift: null" in text
    path.write_text(json.dumps({"distributions": {"label": {"a": 1}}}))
    assert drift.distributions(path) == {"label": {"a": 1}}
    path.write_text("[")
    with pytest.raises(IntegrityError, match=r"profile\.json"):
        drift.distributions(path)
