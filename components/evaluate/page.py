"""The evaluation's page: the verdict in a sentence, then every number behind it.

Labels' names are shown, and no row's text but what contestants wrote for the golden rows, where the line allows that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from components.evaluate import intruders
from components.evaluate.found import Found
from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core import html
from qlora_retrain.core.html import Html, Mark
from qlora_retrain.evaluation import verdict
from qlora_retrain.evaluation.metrics.texts import rouge_l
from qlora_retrain.evaluation.rows import Row, RowScore
from qlora_retrain.evaluation.rules.comparison import suite, unit
from qlora_retrain.evaluation.verdict import Verdict
from qlora_retrain.lm import chat

_MOST = 50  # rows of a table; with 77 labels the worst 50 are enough to see what is wrong
_SHOWN = 20  # golden rows side by side


def write(judged: Verdict, found: Found, config: EvaluateConfig, golden: Sequence[Row]) -> str:
    """The page.

    Args:
        judged: The verdict.
        found: All that was measured.
        config: The line's settings.
        golden: The golden rows, where the line allows their text on the page; else none.
    """
    blocks = [
        _section("Against the others", _forest(found), "Right of 0 the challenger is better; a tick marks a limit."),
        html.section("Rules", html.table(*verdict.rules_table(judged.rules))),
        *(_numbers(title, found.measured[name]) for name, title in _SUITES.items()),
        _section("Slices, the worst first", _slices(found)),
        *_labels(found),
        _section("What contestants wrote for the golden rows, the most changed first", *_side_by_side(found, golden)),
        *_broken(found, config),
    ]
    return html.page(f"Evaluation: {judged.verdict}", judged.sentence, *(b for b in blocks if b is not None))


_SUITES = {"eval": "Evaluation rows", "golden": "Golden rows", "reference": "Reference text: forgetting"}


def by_label(rows: Sequence[RowScore], answers: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """(label, rows, right answers) of every label that has rows, the worst first."""
    rows_of = Counter(answers[score.id] for score in rows)
    hits = Counter(answers[score.id] for score in rows if score.correct)
    return sorted(((label, n, hits[label]) for label, n in rows_of.items()), key=lambda x: (x[2] / x[1], x[0]))


def confusions(
    rows: Sequence[RowScore], before: Sequence[RowScore], answers: Mapping[str, str]
) -> list[tuple[str, str, int, int]]:
    """(answer, what was predicted instead, rows, rows of the other contestant), the most changed first."""
    ours, theirs = (
        Counter((answers[score.id], str(score.predicted)) for score in scores if not score.correct)
        for scores in (rows, before)
    )
    pairs = sorted(ours.keys() | theirs.keys(), key=lambda p: (-abs(ours[p] - theirs[p]), -ours[p], p))
    return [(answer, predicted, ours[answer, predicted], theirs[answer, predicted]) for answer, predicted in pairs]


def _section(heading: str, *blocks: str | None) -> Html | None:
    """A section of the blocks that have something to say, if its first one has."""
    kept = [block for block in blocks if block]
    return html.section(heading, *kept) if blocks and blocks[0] else None


def _numbers(title: str, measured: Mapping[str, Mapping[str, float | None]]) -> Html | None:
    return html.section(title, html.table(*verdict.numbers_table(measured))) if measured else None


def _forest(found: Found) -> Html | None:
    marks = [
        Mark(f"{d['suite']} rows, against {d['against']}", d["value"], d["low"], d["high"], d["limit"])
        for d in found.differences
    ]
    return html.forest_plot(marks, f"gain in {unit(found.differences[0]['metric'])}") if marks else None


def _slices(found: Found) -> Html | None:
    judged = [s for s in found.slices if s.gain]
    if not found.slices:
        return None
    few = len(found.slices) - len(judged)
    note = f"; {few} with too few rows are not shown" if few else ""
    return html.forest_plot(
        [
            Mark(f"{s.name} ({s.rows} rows)", s.gain.value, s.gain.low, s.gain.high, None)
            for s in judged[:_MOST]
            if s.gain
        ],
        f"gain over the {found.slices[0].against}, {_caption('slices', len(judged))}{note}",
    )


def _labels(found: Found) -> list[Html]:
    rows = suite(found.scores["challenger"], "eval")
    if not any(score.predicted is not None for score in rows):
        return []
    labels, answers = by_label(rows, found.answers["eval"]), found.answers["eval"]
    table = [(label, n, hits / n) for label, n, hits in labels[:_MOST]]
    pairs = confusions(rows, suite(found.scores[found.rival], "eval"), answers)
    pairs = [pair for pair in pairs if pair[2] != pair[3]]
    changed = [(answer, said, ours, theirs, f"{ours - theirs:+d}") for answer, said, ours, theirs in pairs[:_MOST]]
    headers = ["answer", "predicted", "challenger, rows", f"{found.rival}, rows", "change"]
    return [
        html.section(
            "The challenger by label, the worst first",
            html.table(["label", "rows", "accuracy"], table, caption=_caption("labels", len(labels))),
        ),
        html.section(
            f"Confusions that changed since the {found.rival}",
            html.table(headers, changed, caption=_caption("pairs", len(pairs)))
            if pairs
            else "None: both confuse the same labels, as often.",
        ),
    ]


def _side_by_side(found: Found, golden: Sequence[Row]) -> list[Html | None]:
    """Answers of base, champion and challenger to each golden row, those least alike first."""
    names = [name for name in ("base", "champion", "challenger") if found.written.get(name)]
    if not golden or "challenger" not in names:
        return [None]
    rival = found.written[found.rival]
    ours = found.written["challenger"]
    ordered = sorted(golden, key=lambda row: (rouge_l(rival[row.id], ours[row.id]), row.id))
    return [
        html.numbers(
            {
                "asked": "\n".join(turn["content"] for turn in row.messages if turn["role"] == "user"),
                "wanted": chat.answer_of(row.messages),
                **{name: found.written[name][row.id] or "(nothing)" for name in names},
            }
        )
        for row in ordered[:_SHOWN]
    ]


def _broken(found: Found, config: EvaluateConfig) -> list[Html | None]:
    """What fine-tuning breaks: overfitting, intruder dimensions; and how far the data moved."""
    blocks: list[Html | None] = []
    if found.gap:
        numbers = {
            "nats a token on evaluation rows": found.gap["eval_loss"],
            f"nats a token on {found.gap['train_rows']:.0f} training rows": found.gap["train_loss"],
            "gap": found.gap["gap"],
        }
        blocks.append(html.section("Overfitting: evaluation rows against training rows", html.numbers(numbers)))
    if found.layers:
        total, seen = sum(s.intruders for s in found.layers), sum(s.looked_at for s in found.layers)
        caption = (
            f"{total} of the {seen} strongest directions have a cosine below {config.intruder_epsilon:g} "
            f"to all that the base had, in {len(found.layers)} matrices"
        )
        blocks.append(
            html.section(
                "Intruder dimensions by layer", html.bar_chart(intruders.by_block(found.layers), caption=caption)
            )
        )
    if found.drift:
        table = [
            (d.what, d.psi, d.low, ", ".join(f"{kind} {was:.1%} to {now:.1%}" for kind, was, now in d.moved[:3]))
            for d in found.drift
        ]
        headers = ["rows by", "PSI", "beyond chance", "what moved most"]
        blocks.append(html.section("Data drift since the champion's", html.table(headers, table)))
    return blocks


def _caption(what: str, count: int) -> str:
    return f"{count} {what}" if count <= _MOST else f"the first {_MOST} of {count} {what}"
