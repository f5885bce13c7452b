"""Render the evaluation's report: the verdict in a sentence, then every number behind it.

It shows the names of labels. It shows the text of a row only for golden rows, with the contestants' completions, and
only where the line allows that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from components.evaluate.intruders import sum_by_block
from components.evaluate.result import EvaluationResult
from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core import html
from qlora_retrain.core.html import ForestRow, Html
from qlora_retrain.evaluation.metrics.completion_metrics import rouge_l
from qlora_retrain.evaluation.metrics.suite_metrics import metrics_table
from qlora_retrain.evaluation.rows import Row, RowScore
from qlora_retrain.evaluation.rules.comparison import display_name, rows_of_suite
from qlora_retrain.evaluation.rules.rule_result import rules_table
from qlora_retrain.evaluation.verdict import Verdict
from qlora_retrain.lm import conversations

# Of 77 labels, the worst 50 are enough to see what is wrong.
_MAX_TABLE_ROWS = 50
# Each golden row takes a table of its own, with the completions of all contestants.
_MAX_GOLDEN_ROWS = 20
_REFUSED = "(its own chat template refuses the row)"
_SUITE_TITLES = {"eval": "Evaluation rows", "golden": "Golden rows", "reference": "Reference text: forgetting"}


def render(verdict: Verdict, result: EvaluationResult, config: EvaluateConfig, golden: Sequence[Row]) -> str:
    """Render the whole page.

    Args:
        verdict: The decision, with its rules.
        result: Everything that was measured.
        config: The line's settings.
        golden: The golden rows, where the line allows their text in the report; else none.
    """
    explanation = "Right of 0 the challenger is better. A dashed tick marks the limit of a rule."
    sections = [
        _section("The challenger compared with the other contestants", _difference_plot(result), explanation),
        html.section("Rules", html.table(*rules_table(verdict.rules))),
        *(_suite_section(title, result.metrics[suite]) for suite, title in _SUITE_TITLES.items()),
        _section("Slices, worst first", _slice_plot(result)),
        *_label_sections(result),
        _section("Completions of the golden rows, most changed first", *_golden_completions(result, golden)),
        *_side_effect_sections(result, config),
    ]
    return html.page(f"Evaluation: {verdict.decision}", verdict.sentence, *(s for s in sections if s is not None))


def accuracy_by_label(rows: Sequence[RowScore], answers: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """Return (label, rows, right predictions) of every label that has rows, the least accurate first."""
    # Ties are broken by name, so that two runs list the labels in one order.
    row_counts = Counter(answers[score.id] for score in rows)
    hits = Counter(answers[score.id] for score in rows if score.correct)
    return sorted(((label, n, hits[label]) for label, n in row_counts.items()), key=lambda x: (x[2] / x[1], x[0]))


def count_confusions(
    ours: Sequence[RowScore], theirs: Sequence[RowScore], answers: Mapping[str, str]
) -> list[tuple[str, str, int, int]]:
    """Return (answer, wrong prediction, our rows, their rows), the most changed first."""
    our_counts, their_counts = (
        Counter((answers[score.id], str(score.predicted)) for score in scores if score.correct is False)
        for scores in (ours, theirs)
    )
    pairs = sorted(
        our_counts.keys() | their_counts.keys(),
        key=lambda p: (-abs(our_counts[p] - their_counts[p]), -our_counts[p], p),
    )
    return [
        (answer, predicted, our_counts[answer, predicted], their_counts[answer, predicted])
        for answer, predicted in pairs
    ]


def _section(heading: str, *blocks: str | None) -> Html | None:
    """Build a section of the blocks that are not empty; None where the first block, its main content, is empty."""
    # A note is shown only with the plot or table that it explains.
    content = [block for block in blocks if block]
    return html.section(heading, *content) if blocks and blocks[0] else None


def _suite_section(title: str, metrics: Mapping[str, Mapping[str, float | None]]) -> Html | None:
    return html.section(title, html.table(*metrics_table(metrics))) if metrics else None


def _difference_plot(result: EvaluationResult) -> Html | None:
    forest_rows = [
        ForestRow(f"{d['suite']} rows, against {d['against']}", d["value"], d["low"], d["high"], d["limit"])
        for d in result.differences
    ]
    if not forest_rows:
        return None
    return html.forest_plot(forest_rows, f"gain in {display_name(result.differences[0]['metric'])}")


def _slice_plot(result: EvaluationResult) -> Html | None:
    # Slices with too few prompts have no interval to draw.
    compared = [s for s in result.slices if s.gain]
    if not result.slices:
        return None
    too_small = len(result.slices) - len(compared)
    note = f"; {too_small} with too few different prompts are not shown" if too_small else ""
    return html.forest_plot(
        [
            ForestRow(f"{s.name} ({s.size})", s.gain.value, s.gain.low, s.gain.high, None)
            for s in compared[:_MAX_TABLE_ROWS]
            if s.gain
        ],
        f"gain over the {result.slices[0].against}: {_caption('slices', len(compared))}{note}",
    )


def _label_sections(result: EvaluationResult) -> list[Html]:
    """Build the accuracy by label, and the confusions that changed; empty where there are no labels."""
    rows = rows_of_suite(result.scores["challenger"], "eval")
    # A text task has no predictions.
    if not any(score.predicted is not None for score in rows):
        return []

    labels, answers = accuracy_by_label(rows, result.answers["eval"]), result.answers["eval"]
    label_rows = [(label, n, hits / n) for label, n, hits in labels[:_MAX_TABLE_ROWS]]

    pairs = count_confusions(rows, rows_of_suite(result.scores[result.rival], "eval"), answers)
    # Only changed confusions show the effect of this fine-tuning.
    pairs = [pair for pair in pairs if pair[2] != pair[3]]
    pair_rows = [
        (answer, predicted, ours, theirs, f"{ours - theirs:+d}")
        for answer, predicted, ours, theirs in pairs[:_MAX_TABLE_ROWS]
    ]
    headers = ["answer", "predicted", "challenger, rows", f"{result.rival}, rows", "change"]
    return [
        html.section(
            "Accuracy of the challenger by label, worst first",
            html.table(["label", "rows", "accuracy"], label_rows, caption=_caption("labels", len(labels))),
        ),
        html.section(
            f"Confusions that changed from the {result.rival}",
            html.table(headers, pair_rows, caption=_caption("pairs", len(pairs)))
            if pairs
            else "None: both confuse the same labels equally often.",
        ),
    ]


def _golden_completions(result: EvaluationResult, golden: Sequence[Row]) -> list[Html | None]:
    """Show the completions of base, champion and challenger for each golden row, the least alike first."""
    names = [name for name in ("base", "champion", "challenger") if result.completions.get(name)]
    if not golden or "challenger" not in names:
        return [None]
    theirs = result.completions[result.rival]
    ours = result.completions["challenger"]
    # The completions that changed most are the ones to read.
    ordered = sorted(golden, key=lambda row: (rouge_l(theirs.get(row.id, ""), ours[row.id]), row.id))
    return [
        html.key_value_table(
            {
                "prompt": "\n".join(turn["content"] for turn in row.messages if turn["role"] == "user"),
                "expected answer": conversations.answer_of(row.messages),
                **{name: result.completions[name].get(row.id, _REFUSED) or "(nothing)" for name in names},
            }
        )
        for row in ordered[:_MAX_GOLDEN_ROWS]
    ]


def _side_effect_sections(result: EvaluationResult, config: EvaluateConfig) -> list[Html | None]:
    """Show the side effects of fine-tuning, overfitting and intruder dimensions, and the drift of the data."""
    sections: list[Html | None] = []
    gap = result.train_eval_gap
    if gap:
        numbers = {
            "nats per token on evaluation rows": gap["eval_loss"],
            f"nats per token on {gap['train_rows']:.0f} training rows": gap["train_loss"],
            "gap": gap["gap"],
        }
        table = html.key_value_table(numbers)
        sections.append(html.section("Overfitting: loss on evaluation rows and on training rows", table))

    if result.intruders:
        total = sum(layer.intruders for layer in result.intruders)
        compared = sum(layer.looked_at for layer in result.intruders)
        caption = (
            f"{total} of the {compared} strongest directions have a cosine below {config.intruder_epsilon:g} "
            f"to every direction of the base (in {len(result.intruders)} matrices)"
        )
        chart = html.bar_chart(sum_by_block(result.intruders), caption=caption)
        sections.append(html.section("Intruder dimensions by layer", chart))

    if result.drifts:
        drift_rows = [
            (
                d.distribution,
                d.psi,
                d.psi_beyond_chance,
                ", ".join(f"{category} {before:.1%} to {now:.1%}" for category, before, now in d.shifts[:3]),
            )
            for d in result.drifts
        ]
        headers = ["rows by", "PSI", "beyond chance", "largest shifts"]
        sections.append(html.section("Data drift since the champion", html.table(headers, drift_rows)))
    return sections


def _caption(plural: str, count: int) -> str:
    return f"{count} {plural}" if count <= _MAX_TABLE_ROWS else f"the first {_MAX_TABLE_ROWS} of {count} {plural}"
