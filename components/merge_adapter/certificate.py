"""Certify the form that ships: its own rules, the JSON document and the page, all without the text of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from components.merge_adapter import agreement, choice_page
from components.merge_adapter.form_scores import FormScores
from components.merge_adapter.halves import Parts
from components.merge_adapter.merge import MergeStats
from components.merge_adapter.trials import Choice
from qlora_retrain.config.merge import MergeConfig
from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core import html
from qlora_retrain.evaluation import answer_endings, verdict
from qlora_retrain.evaluation.metrics.completion_metrics import COMPLETION_METRICS
from qlora_retrain.evaluation.rows import describe_counts
from qlora_retrain.evaluation.rules.ending_rule import answers_end
from qlora_retrain.evaluation.rules.rule_result import format_interval
from qlora_retrain.evaluation.scoring import RowScore
from qlora_retrain.evaluation.stats import Interval
from qlora_retrain.evaluation.verdict import RuleResult, Verdict

ALONE = "adapter"  # among the forms that ship: an adapter without a model
Numbers = dict[str, float | None]

# The columns of the tables; a metric that the line does not measure gets no column.
_CANDIDATE_COLUMNS = ("loss", "accuracy", "macro_f1", *COMPLETION_METRICS, answer_endings.METRIC, "kl", "agreement")
_EXPORT_COLUMNS = ("cost", "loss", "accuracy", *COMPLETION_METRICS, answer_endings.METRIC, "agreement")


@dataclass(frozen=True, slots=True)
class Certificate:
    """Everything that is certified.

    Attributes:
        choice: Base, rank and strength of the form that ships, and why they were chosen.
        outcome: The verdict by the rules of the evaluation and of the merge.
        merge_cost: The rule on the loss increase over the unmerged model, on the rows that certify.
        row_counts: The number of rows in each half.
        prompt_counts: The number of different prompts in each half.
        forms: The numbers of the unmerged model and of every candidate, on either half.
        suites: The numbers of the unmerged model and of the one that ships, on golden rows and reference text.
        compared_positions: On how many of how many supervised tokens KL and agreement rest: `compared`, `of`.
        stats: The statistics of the merge.
        exports: Every form that ships: its path below `model/`, its size and its numbers.
        served_adapter: The adapter's numbers over each base that a server may load it on, by the base's name.
        serving_warnings: Known problems of serving the adapter without merging.
    """

    choice: Choice
    outcome: Verdict
    merge_cost: RuleResult
    row_counts: dict[str, int]
    prompt_counts: dict[str, int]
    forms: dict[str, dict[str, Numbers]]
    suites: dict[str, dict[str, Numbers]]
    compared_positions: dict[str, int]
    stats: MergeStats
    exports: dict[str, dict[str, Any]]
    served_adapter: dict[str, Numbers]
    serving_warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the content of `certificate.json`. Published versions hold it, so its names never change."""
        winner = self.choice.winner.candidate
        # Suites without rows are left out.
        return {
            "verdict": self.outcome.decision,
            "sentence": self.outcome.sentence,
            "form": winner.name,
            "base": winner.base,
            "rank": self.choice.rank,
            "strength": winner.strength,
            "adapters": winner.num_adapters,
            "reduced_intruders": winner.has_reduced_intruders,
            "why": self.choice.sentence,
            "rows": self.row_counts,
            "prompts": self.prompt_counts,
            "merge_loss_nats": {
                "value": self.merge_cost.value,
                "low": self.merge_cost.low,
                "high": self.merge_cost.high,
            },
            "candidates": choice_page.as_json(self.choice),
            "forms": self.forms,
            **{suite: numbers for suite, numbers in self.suites.items() if numbers},
            "rules": self.outcome.rules_as_json(),
            "compared_positions": self.compared_positions,
            "built": asdict(self.stats),
            "exports": self.exports,
            "served_adapter": self.served_adapter,
            "serving_warnings": self.serving_warnings,
        }

    def page(self) -> str:
        """Return the certificate as a page for a person."""
        titles = {"golden": "Golden rows", "reference": "Reference text"}
        return html.page(
            f"{'Adapter alone' if ALONE in self.exports else 'Merged model'}: {self.outcome.decision}",
            self.outcome.sentence,
            html.section("Rules", html.table(*verdict.rules_table(self.outcome.rules))),
            html.section(
                "Selected form",
                self.choice.sentence,
                *self._candidate_tables(),
                agreement.positions_sentence(self.compared_positions),
            ),
            *choice_page.sections(self.choice),
            *(
                html.section(titles[suite], html.table(*verdict.metrics_table(numbers)))
                for suite, numbers in self.suites.items()
                if numbers
            ),
            html.section(
                "Exported forms",
                self._export_table(),
                *(f"{name}: {note}." for name, export in self.exports.items() for note in export["notes"]),
            ),
            html.section(
                "Serving the adapter without merging",
                *self._served_table(),
                *(self.serving_warnings or ["No problem is known with vLLM, TGI and llama.cpp."]),
            ),
            html.section(
                "Merge statistics",
                html.key_value_table({"base": self.choice.winner.candidate.base, **asdict(self.stats)}),
            ),
        )

    def _candidate_tables(self) -> list[html.Html]:
        """Return a table for each half that has rows."""
        titles = {
            "selection": f"the {self._size('selection')} that select the form",
            "certification": f"the {self._size('certification')} that certify it",
        }
        return [
            html.table(*verdict.metrics_table(self.forms[half], "form", _CANDIDATE_COLUMNS), caption=title)
            for half, title in titles.items()
            if self.row_counts[half]
        ]

    def _export_table(self) -> html.Html:
        headers, rows = verdict.metrics_table(self.exports, "form", _EXPORT_COLUMNS)

        # bf16 is the model folder itself; its path is ".".
        location_cells = {
            name: ["(the folder itself)" if export["path"] == "." else export["path"], export["size_bytes"] / 2**20]
            for name, export in self.exports.items()
        }
        return html.table(
            [headers[0], "path below model/", "MiB", *headers[1:]],
            [[name, *location_cells[name], *cells] for name, *cells in rows],
            caption=f"on the {self._size('certification')} that certify",
        )

    def _served_table(self) -> list[html.Html]:
        table = verdict.metrics_table(self.served_adapter, "over", _CANDIDATE_COLUMNS)
        caption = f"the adapter over each base, on the {self._size('certification')} that certify"
        return [html.table(*table, caption=caption)] if self.served_adapter else []

    def _size(self, half: str) -> str:
        return describe_counts(self.row_counts[half], self.prompt_counts[half])


def merge_rules(
    config: MergeConfig, settings: EvaluateConfig, unmerged: Sequence[RowScore], merged: FormScores
) -> list[RuleResult]:
    """Apply the merge's own rules, on the rows that certify; the first is the cost of merging."""
    results = [verdict.merge_cost(unmerged, merged.scores, config.max_loss_increase_nats, settings)]

    # KL and agreement are rules only where the line sets a limit, because a merged model that differs may be better.
    if config.max_kl_nats is not None:
        value, limit = agreement.mean_kl(merged.agreement, settings), config.max_kl_nats
        text = f"KL from the unmerged model in nats per token: {_format(value)}; "
        text += f"its upper end must not lie above {limit:g}"
        results.append(_interval_rule("kl_to_live", text, value, limit, value is not None and value.high <= limit))
    if config.min_agreement is not None:
        value, limit = agreement.greedy_agreement(merged.agreement, settings), config.min_agreement
        text = f"tokens with the unmerged model's choice: {_format(value)}; its lower end must not lie below {limit:g}"
        results.append(_interval_rule("agreement", text, value, limit, value is not None and value.low >= limit))
    return results


def certify_export(
    config: MergeConfig,
    settings: EvaluateConfig,
    unmerged: Sequence[RowScore],
    name: str,
    export: FormScores,
    answers: Mapping[str, str],
) -> tuple[Numbers, list[RuleResult]]:
    """Return an export's numbers with its cost against the unmerged model, and its rules.

    A form whose loss is not finite is always refused.
    """
    # Without a limit the cost is only reported, since no finite loss is above infinity.
    limit = config.max_export_loss_increase_nats
    rule = verdict.merge_cost(unmerged, export.scores, limit or math.inf, settings)
    cost: Numbers = {"cost": rule.value, "cost_low": rule.low, "cost_high": rule.high}
    has_rule = limit is not None or rule.passed is False

    # The rule's sentence is about merging, but here the export causes the cost.
    rule_name = f"export_{name}"
    text = rule.text.replace("lost by merging", f"lost by {name} against the unmerged model")
    rules = [replace(rule, name=rule_name, text=text, limit=limit)] if has_rule else []
    ending = answers_end(export.scores, settings, f"{rule_name}_answers_end")
    rules.append(replace(ending, text=f"{name}: {ending.text}"))
    return form_numbers(export, settings, answers) | cost, rules


def _interval_rule(name: str, text: str, interval: Interval | None, limit: float, passed: bool) -> RuleResult:
    # There is no interval where the value is not finite, and such a form must not pass.
    if interval is None:
        return RuleResult(name, text, limit=limit, passed=False)
    return RuleResult(name, text, interval.value, interval.low, interval.high, limit, passed)


def min_prompts_rules(config: MergeConfig, parts: Parts, prompt_counts: Mapping[str, int]) -> list[RuleResult]:
    """Check that both halves have enough prompts, where halves are used; too few are insufficient evidence."""
    if not parts.needs_rows and not parts.rows.selection:
        return []
    fewest, limit = min(prompt_counts.values()), config.min_prompts
    text = f"rows of {prompt_counts['selection']} different prompts select the form, those of "
    text += f"{prompt_counts['certification']} others certify it"
    if fewest >= limit:
        return [RuleResult("merge_prompts", text, fewest, limit=limit, passed=True)]

    # `passed` stays None, because too few prompts are missing evidence and not a failure.
    text += f"; at least {limit} different prompts of each are needed (merge.min_prompts): keep more evaluation rows, "
    text += "or set merge.base to one base and merge.rank to full"
    return [RuleResult("merge_prompts", text, fewest, limit=limit)]


def form_numbers(form: FormScores, settings: EvaluateConfig, answers: Mapping[str, str]) -> Numbers:
    """Return the metrics of a form, with KL and agreement; empty where there are no rows."""
    numbers = verdict.compute_metrics(form.scores, settings, answers)

    # Only rows on which the form was compared with the unmerged model have these two.
    for name, compute in (("kl", agreement.mean_kl), ("agreement", agreement.greedy_agreement)):
        if interval := compute(form.agreement, settings):
            numbers |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return numbers


def _format(interval: Interval | None) -> str:
    return "not finite" if interval is None else format_interval(interval, sign="")
