"""How far a data set has drifted from the one that a version learned: labels, lengths and languages of its rows.

The measure is the population stability index, sum((p - q) ln(p / q)) over the kinds of rows: below 0.1 is little, above
0.25 is a different population. Small samples of one population differ too: with n and m rows of k kinds the index is
about (1/n + 1/m) times a chi-squared variable of k - 1 degrees (Yurdakul and Naranjo 2020). What that could make at the
given confidence is taken off, and only what is left is held against the limit.
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

_UNSEEN = 0.5  # rows added to each kind, so that one which is new has a finite index
_NAMED = 3  # kinds told by name in a sentence
Counts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Drift:
    """How far one distribution moved.

    Attributes:
        what: `label`, `length` or `language`.
        psi: The index.
        low: What of it the size of the samples cannot explain.
        moved: The kinds that moved most, as (kind, share before, share now).
    """

    what: str
    psi: float
    low: float
    moved: tuple[tuple[str, float, float], ...]


def distributions(profile: Path) -> dict[str, Counts] | None:
    """What `profile.json` of a data set counts, by `label`, `length` and `language`; None in one that is older.

    Raises:
        IntegrityError: If the file is not a profile.
    """
    try:
        document = json.loads(profile.read_text(encoding="utf-8"))
        found = document.get("distributions")
    except (OSError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{profile.name}: not a data profile: {error}") from error
    return found if isinstance(found, dict) else None


def measure(before: Mapping[str, Counts], now: Mapping[str, Counts], confidence: float) -> list[Drift]:
    """The drift of every distribution that both have, the furthest first."""
    found = [_drift(what, before[what], now[what], confidence) for what in before if what in now]
    return sorted(found, key=lambda d: (-d.low, -d.psi))


def judge(found: Sequence[Drift] | None, limit: float, whose: str) -> tuple[str, bool | None]:
    """What there is to say of the furthest drift, and whether it is allowed; None where nothing could be compared.

    Args:
        found: `measure`'s; None: the version's profile counts nothing.
        limit: The largest index allowed, beyond what chance explains.
        whose: The version, for the sentence, e.g. `the champion's data`.
    """
    if found is None:
        return f"{whose} was profiled by a release that counted no distributions; set max_drift: null for one run", None
    if not found:
        return f"nothing of {whose} can be compared", None
    worst = found[0]
    moved = ", ".join(f"{kind} {was:.1%} to {now:.1%}" for kind, was, now in worst.moved[:_NAMED])
    text = (
        f"drift from {whose}: {worst.what} moved most, PSI {worst.psi:.3f}, {worst.low:.3f} beyond chance ({moved}); "
    )
    return f"{text}the limit is {limit:g}", worst.low <= limit


def as_json(found: list[Drift]) -> list[dict[str, Any]]:
    """The drift as `evaluation.json` holds it."""
    return [{"what": d.what, "psi": d.psi, "beyond_chance": d.low, "moved": d.moved[:_NAMED]} for d in found]


def _drift(what: str, before: Counts, now: Counts, confidence: float) -> Drift:
    kinds = sorted(before.keys() | now.keys())
    old, new = sum(before.values()), sum(now.values())
    shares = {
        kind: tuple(
            (counts.get(kind, 0) + _UNSEEN) / (rows + _UNSEEN * len(kinds))
            for counts, rows in ((before, old), (now, new))
        )
        for kind in kinds
    }
    terms = {kind: (q - p) * math.log(q / p) for kind, (p, q) in shares.items()}
    psi = math.fsum(terms.values())
    chance = (1 / max(1, old) + 1 / max(1, new)) * _chi_squared(len(kinds) - 1, confidence)
    moved = sorted(kinds, key=lambda kind: (-terms[kind], kind))
    return Drift(what, psi, max(0.0, psi - chance), tuple((kind, *shares[kind]) for kind in moved))  # type: ignore[misc]


def _chi_squared(degrees: int, confidence: float) -> float:
    """The quantile, by Wilson and Hilferty's cube (1931), within 2 % from 2 degrees up; 0 for 0 degrees."""
    if degrees < 1:
        return 0.0
    part = 2 / (9 * degrees)
    return degrees * (1 - part + NormalDist().inv_cdf(confidence) * math.sqrt(part)) ** 3
