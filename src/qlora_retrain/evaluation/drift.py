"""Measure how far a data set has drifted from a version's training data, in labels, lengths and languages.

The measure is the population stability index (PSI), sum((p - q) ln(p / q)) over the categories of a distribution.
Below 0.1 it is small; above 0.25 the population is a different one.

Small samples of one population also differ. With n and m rows in k categories the index is about (1/n + 1/m) times a
chi-squared variable of k - 1 degrees of freedom (Yurdakul and Naranjo 2020). The part that this could explain at the
given confidence is subtracted, and only the remainder is compared with the limit. The rows of one prompt mostly have
one length and one language, so n and m are numbers of prompts where the profiles state them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from qlora_retrain.core.errors import IntegrityError

# Prompts added to each category, so that a new or missing category has a finite index.
_PSEUDOCOUNT_PROMPTS = 0.5
_MAX_CATEGORIES_IN_SENTENCE = 3
Counts = Mapping[str, int]  # rows by category


@dataclass(frozen=True, slots=True)
class Drift:
    """The drift of one distribution.

    Attributes:
        distribution: `label`, `length` or `language`.
        psi: The population stability index.
        psi_beyond_chance: The part of it that the size of the samples cannot explain.
        shifts: All categories as (category, fraction before, fraction now), the largest change first.
    """

    distribution: str
    psi: float
    psi_beyond_chance: float
    shifts: tuple[tuple[str, float, float], ...]


def read_distributions(profile: Path) -> dict[str, Counts] | None:
    """Read the counts of a data set's `profile.json`, by `label`, `length` and `language`.

    Return None for a profile of an older release, which has no such counts.

    Raises:
        IntegrityError: If the file is not a profile.
    """
    try:
        document = json.loads(profile.read_text(encoding="utf-8"))
        distributions = document.get("distributions")
    except (OSError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{profile.name}: the file is not a data profile: {error}") from error
    return distributions if isinstance(distributions, dict) else None


def read_prompts(profile: Path) -> int | None:
    """Return how many different prompts the rows of a data set's `profile.json` have.

    Return None for a profile of an older release, which does not say so.
    """
    prompts = json.loads(profile.read_text(encoding="utf-8")).get("prompts")
    return prompts["train"] + prompts["eval"] if prompts else None


def read_rows(profile: Path) -> int | None:
    """Return how many rows were read for a data set's `profile.json`; None where an older release does not say so."""
    rows = json.loads(profile.read_text(encoding="utf-8")).get("rows")
    return rows.get("read") if isinstance(rows, dict) else None


def compute_drift(
    before: Mapping[str, Counts],
    now: Mapping[str, Counts],
    confidence: float,
    prompts: tuple[int | None, int | None] = (None, None),
) -> list[Drift]:
    """Compute the drift of every distribution that both data sets have, the largest first.

    Args:
        before: The distributions of the one data set, by name.
        now: Those of the other.
        confidence: The confidence with which chance cannot explain what remains.
        prompts: The number of different prompts of either; None: each row has its own.
    """
    drifts = [_compute_one(name, before[name], now[name], confidence, prompts) for name in before if name in now]
    return sorted(drifts, key=lambda d: (-d.psi_beyond_chance, -d.psi))


def check_limit(drifts: Sequence[Drift] | None, limit: float, data_name: str) -> tuple[str, bool | None]:
    """Return a sentence on the largest drift, and whether it is allowed; None where nothing could be compared.

    Args:
        drifts: The result of `compute_drift`; None: the profile of that version has no counts.
        limit: The largest index allowed, beyond what chance explains.
        data_name: The data compared with, for the sentence, e.g. `the champion's data`.
    """
    if drifts is None:
        text = f"the profile of {data_name} is of an older release without distributions; "
        return f"{text}set max_drift_psi: null for one run", None
    if not drifts:
        return f"{data_name} has no distribution that can be compared", None

    # `compute_drift` lists the largest first.
    largest = drifts[0]
    shifts = ", ".join(
        f"{category} {before:.1%} to {now:.1%}"
        for category, before, now in largest.shifts[:_MAX_CATEGORIES_IN_SENTENCE]
    )
    text = f"drift from {data_name}: {largest.distribution} moved most, PSI {largest.psi:.3f}, "
    text += f"{largest.psi_beyond_chance:.3f} beyond chance ({shifts}); "
    return f"{text}the limit is {limit:g}", largest.psi_beyond_chance <= limit


def as_json(drifts: list[Drift]) -> list[dict[str, Any]]:
    """Return the drift as `evaluation.json` holds it."""
    return [
        {
            "what": d.distribution,
            "psi": d.psi,
            "beyond_chance": d.psi_beyond_chance,
            "moved": d.shifts[:_MAX_CATEGORIES_IN_SENTENCE],
        }
        for d in drifts
    ]


def _compute_one(
    distribution: str, before: Counts, now: Counts, confidence: float, prompts: tuple[int | None, int | None]
) -> Drift:
    categories = sorted(before.keys() | now.keys())
    # Both fractions are over all categories of either data set, so that they are comparable.
    rows = sum(before.values()), sum(now.values())
    sizes = tuple(max(1, n or num_rows) for n, num_rows in zip(prompts, rows, strict=True))
    added = [_PSEUDOCOUNT_PROMPTS * max(1, num_rows) / n for num_rows, n in zip(rows, sizes, strict=True)]
    fractions = {
        category: tuple(
            (counts.get(category, 0) + added_rows) / (num_rows + added_rows * len(categories))
            for counts, num_rows, added_rows in zip((before, now), rows, added, strict=True)
        )
        for category in categories
    }
    terms = {category: (q - p) * math.log(q / p) for category, (p, q) in fractions.items()}
    psi = math.fsum(terms.values())

    # Two samples of one population exceed this index by chance with probability 1 - confidence.
    scale = sum(1 / n for n in sizes)
    psi_by_chance = scale * _chi_squared_quantile(len(categories) - 1, confidence)
    ordered = sorted(categories, key=lambda category: (-terms[category], category))
    shifts = tuple((category, *fractions[category]) for category in ordered)
    return Drift(distribution, psi, max(0.0, psi - psi_by_chance), shifts)  # type: ignore[arg-type]


def _chi_squared_quantile(degrees_of_freedom: int, confidence: float) -> float:
    """Approximate the quantile by Wilson and Hilferty's cube (1931), within 2 % from 2 degrees up; 0 for 0 degrees."""
    if degrees_of_freedom < 1:
        return 0.0
    variance = 2 / (9 * degrees_of_freedom)
    return degrees_of_freedom * (1 - variance + NormalDist().inv_cdf(confidence) * math.sqrt(variance)) ** 3
