"""The evaluation's page: the verdict in a sentence, then every number behind it; labels' names, never a row's text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from qlora_retrain import report, verdict
from qlora_retrain.scoring import RowScore

_MOST = 50  # rows of a table; with 77 labels the worst 50 are enough to see what is wrong

Measured = Mapping[str, Mapping[str, float | None]]


def write(
    judged: verdict.Verdict, suites: Mapping[str, Measured], rows: Sequence[RowScore], answers: Mapping[str, str]
) -> str:
    """The page.

    Args:
        judged: The verdict.
        suites: Contestants' numbers by suite.
        rows: The challenger's scores on the evaluation rows.
        answers: The true answer of each row id.
    """
    blocks = [report.section("Rules", report.table(*verdict.rules_table(judged.rules)))]
    titles = {"eval": "Evaluation rows", "golden": "Golden rows", "reference": "Reference text"}
    blocks += [
        report.section(titles[suite], report.table(*verdict.numbers_table(measured)))
        for suite, measured in suites.items()
        if measured
    ]
    if any(score.predicted is not None for score in rows):
        blocks.append(report.section("The challenger by label", _by_label(rows, answers)))
        blocks.append(report.section("What the challenger confuses", _confusions(rows, answers)))
    return report.page(f"Evaluation: {judged.verdict}", judged.sentence, *blocks)


def by_label(rows: Sequence[RowScore], answers: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """(label, rows, right answers) of every label that has rows, the worst first."""
    rows_of = Counter(answers[score.id] for score in rows)
    hits = Counter(answers[score.id] for score in rows if score.correct)
    return sorted(((label, n, hits[label]) for label, n in rows_of.items()), key=lambda x: (x[2] / x[1], x[0]))


def confusions(rows: Sequence[RowScore], answers: Mapping[str, str]) -> list[tuple[str, str, int]]:
    """(answer, what was predicted instead, rows), the most frequent first."""
    pairs = Counter((answers[score.id], str(score.predicted)) for score in rows if not score.correct)
    return [(answer, predicted, n) for (answer, predicted), n in sorted(pairs.items(), key=lambda x: (-x[1], x[0]))]


def _by_label(rows: Sequence[RowScore], answers: Mapping[str, str]) -> str:
    found = by_label(rows, answers)
    table = [(label, n, hits / n) for label, n, hits in found[:_MOST]]
    return report.table(["label", "rows", "accuracy"], table, caption=_caption("labels", len(found)))


def _confusions(rows: Sequence[RowScore], answers: Mapping[str, str]) -> str:
    found = confusions(rows, answers)
    if not found:
        return "Nothing: every row was answered rightly."
    return report.table(["answer", "predicted", "rows"], found[:_MOST], caption=_caption("pairs", len(found)))


def _caption(what: str, count: int) -> str:
    return f"{count} {what}" if count <= _MOST else f"the first {_MOST} of {count} {what}"
