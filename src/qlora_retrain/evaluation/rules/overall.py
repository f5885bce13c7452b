"""The rules over all rows of a suite: gain over the base, losses to champion and anchor, floors, golden, forgetting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import stats
from qlora_retrain.evaluation.rules.comparison import (
    YES_OR_NO,
    Metric,
    Scores,
    gain,
    known,
    level,
    metric_of,
    paired,
    suite,
    unit,
)
from qlora_retrain.evaluation.rules.comparison import value as value_of
from qlora_retrain.evaluation.rules.rule import Rule, ends, said

# Of 2,000 at the limit so many passed by chance on 6, 12 and 16 passages: where each loses exponentially many nats,
# 5.8, 5.1 and 3.5 %; where one in five loses a quarter of its right tokens and the others none, 26, 7.8 and 4.1 %.
_MIN_PASSAGES = 16


def all_of(scores: Scores, settings: EvaluateConfig) -> Iterator[Rule]:
    """Every rule over whole suites that the line has."""
    metric = metric_of(scores, settings)
    told = rows_told(scores, "eval", metric)
    if told == 0:
        yield Rule("primary_metric", f"{unit(metric)} is the primary metric, but says nothing of any evaluation row")
        return
    if told < settings.min_rows:
        text = f"{unit(metric)} is the primary metric, and says something of {told} evaluation rows; at least "
        yield Rule("primary_metric", f"{text}{settings.min_rows} are needed", told, limit=settings.min_rows)
        return
    yield gain_over_base(scores, metric, settings)
    yield from losses(scores, metric, settings)
    if settings.min_accuracy is not None:
        yield floor("accuracy_floor", "accuracy", scores, settings, settings.min_accuracy)
    for name, limit in settings.floors.items():
        yield floor(f"{name}_floor", name, scores, settings, limit)
    if suite(scores["challenger"], "golden"):
        yield golden(scores, metric, settings)
    if settings.max_forgetting_nats is not None:
        yield forgetting(scores, settings, "loss", settings.max_forgetting_nats)
    if settings.max_forgetting_accuracy is not None:
        yield forgetting(scores, settings, "token_accuracy", settings.max_forgetting_accuracy)


def rows_told(scores: Scores, name: str, metric: Metric) -> int:
    """How many rows of a suite the metric says something of."""
    return sum(known(row, metric) for row in suite(scores["challenger"], name))


def gain_over_base(scores: Scores, metric: Metric, settings: EvaluateConfig) -> Rule:
    """The challenger must be better than the base, surely."""
    found, limit = gain(scores, "base", "eval", metric, settings), settings.min_gain_over_base
    text = f"{unit(metric)} against the base: {said(found)}; its lower end must lie above {limit:g}"
    return Rule("gain_over_base", text + _coin(scores, "base", metric), *ends(found), limit, found.low > limit)


def losses(scores: Scores, metric: Metric, settings: EvaluateConfig) -> Iterator[Rule]:
    """The challenger must not be worse than the champion by more than a margin, nor than the line's best version.

    Where the champion is the best version, `anchor` is not among the scores, and the champion stands for it.
    """
    limit = settings.max_loss_to_champion
    if "champion" not in scores:
        if settings.first_release:
            yield Rule("loss_to_champion", "no champion yet; first_release allows it", limit=limit, passed=True)
            return
        text = "no champion to compare with; set evaluate.first_release: true to allow the first version"
        yield Rule("loss_to_champion", text, limit=limit)
        return
    yield _loss_to("champion", "champion", scores, metric, settings, limit)
    limit = limit if settings.max_loss_to_anchor is None else settings.max_loss_to_anchor
    anchor = "anchor" if "anchor" in scores else "champion"
    yield _loss_to("anchor", anchor, scores, metric, settings, limit)


def _loss_to(role: str, rival: str, scores: Scores, metric: Metric, settings: EvaluateConfig, limit: float) -> Rule:
    found = gain(scores, rival, "eval", metric, settings).negative
    who = "champion" if role == "champion" else "best version so far" + (", the champion" if rival != role else "")
    text = f"{unit(metric)} lost to the {who}: {said(found)}; its upper end must not lie above {limit:g}"
    rows = rows_told(scores, "eval", metric)
    least = stats.smallest_excluded(rows, settings.confidence)
    if metric in YES_OR_NO and found.high > limit >= found.value and least > limit:
        text += f". {rows} rows can rule out no loss below {least:.3f}, even if all are answered alike"
        return Rule(f"loss_to_{role}", text, *ends(found), limit)
    return Rule(f"loss_to_{role}", text + _coin(scores, rival, metric), *ends(found), limit, found.high <= limit)


def floor(name: str, metric: Metric, scores: Scores, settings: EvaluateConfig, limit: float) -> Rule:
    """A metric's measured value must not lie below a limit."""
    rows = [row for row in suite(scores["challenger"], "eval") if metric == "macro_f1" or known(row, metric)]
    if not rows or (metric == "macro_f1" and not known(rows[0], "accuracy")):
        return Rule(
            name, f"a floor for {unit(metric)} is set, but nothing was measured: the task has none", limit=limit
        )
    if metric == "macro_f1":
        found = stats.macro_f1_interval(
            [_label(row.slices, row.predicted, row.correct) for row in rows], [str(row.predicted) for row in rows],
            confidence=settings.confidence, samples=settings.bootstrap_samples, seed=settings.seed,
        )  # fmt: skip
    else:
        found = level(rows, metric, settings)
    text = f"{unit(metric)} {said(found, sign='')}; the floor is {limit:g}"
    return Rule(name, text, *ends(found), limit, found.value >= limit)


def golden(scores: Scores, metric: Metric, settings: EvaluateConfig) -> Rule:
    """The challenger must not be surely worse than the champion, or the base, on the hand-kept rows."""
    rows = rows_told(scores, "golden", metric)
    if rows < settings.min_golden_rows:  # which is at least 1
        untold = len(suite(scores["challenger"], "golden")) - rows
        text = f"{rows} golden rows" + (f" beside {untold} of which {unit(metric)} says nothing" if untold else "")
        text += f"; at least {settings.min_golden_rows} are needed (evaluate.min_golden_rows)"
        return Rule("golden", text, rows, limit=settings.min_golden_rows)
    rival = "champion" if "champion" in scores else "base"
    found = gain(scores, rival, "golden", metric, settings).negative
    text = f"{unit(metric)} lost to the {rival} on the golden rows: {said(found)}; it must not lie wholly above 0"
    return Rule("golden", text, *ends(found), 0.0, found.low <= 0.0)


def forgetting(scores: Scores, settings: EvaluateConfig, metric: Metric, limit: float) -> Rule:
    """What is lost on reference text against the base, in nats a token or in the share of right next tokens."""
    name = "forgetting" if metric == "loss" else "forgetting_accuracy"
    passages = len([row for row in suite(scores["challenger"], "reference") if known(row, metric)])
    if passages < _MIN_PASSAGES:
        text = f"a limit on forgetting is set, but there are {passages} passages of reference text and "
        text += f"at least {_MIN_PASSAGES} are needed; set sources.reference_data to general text"
        return Rule(name, text, passages, limit=limit)
    found = gain(scores, "base", "reference", metric, settings).negative
    text = f"{unit(metric)} lost on reference text: {said(found)}; its upper end must not lie above {limit:g}"
    return Rule(name, text, *ends(found), limit, found.high <= limit)


def best(scores: Scores, settings: EvaluateConfig) -> str:
    """Which contestant is the line's best version from now on: `challenger`, `anchor` or `champion`.

    The challenger takes the place only where it is surely better, so that equal ones do not slip away one by one.
    """
    holder = next((name for name in ("anchor", "champion") if name in scores), None)
    if holder is None:
        return "challenger"
    found = gain(scores, holder, "eval", metric_of(scores, settings), settings)
    return "challenger" if found.low > 0 else holder


def _label(slices: tuple[str, ...], predicted: str | None, correct: bool | None) -> str:
    """A row's answer: what it was rightly given, else the label among its slices."""
    if correct:
        return str(predicted)
    return next((name.removeprefix("label=") for name in slices if name.startswith("label=")), "")


def _coin(scores: Scores, rival: str, metric: Metric) -> str:
    if metric not in YES_OR_NO:
        return ""
    ours, theirs = paired(scores["challenger"], scores[rival], "eval")
    sides = [(a, b) for a, b in zip(ours, theirs, strict=True) if known(a, metric)]
    p = stats.mcnemar([value_of(a, metric) > 0 for a, _ in sides], [value_of(b, metric) > 0 for _, b in sides])
    return f" (exact McNemar p {p:.3g})"


def differences(scores: Scores, settings: EvaluateConfig) -> list[dict[str, Any]]:
    """Every comparison of the challenger, for the report's forest plot and `evaluation.json`; gains above 0."""
    metric = metric_of(scores, settings)
    champion, anchor = settings.max_loss_to_champion, settings.max_loss_to_anchor
    limits = {
        "base": settings.min_gain_over_base,
        "champion": -champion,
        "anchor": -(champion if anchor is None else anchor),
    }
    found: list[dict[str, Any]] = []
    for name in ("eval", "golden"):
        if not any(known(row, metric) for row in suite(scores["challenger"], name)):
            continue
        for rival in (r for r in ("base", "base_nf4", "champion", "anchor") if r in scores):
            seen = gain(scores, rival, name, metric, settings)
            limit = limits.get(rival) if name == "eval" else None
            found.append({"suite": name, "against": rival, "metric": metric, "limit": limit,
                          "value": seen.value, "low": seen.low, "high": seen.high})  # fmt: skip
    return found
