"""What the certificate says of the form that ships, as rules, as JSON and as a page; counts and names, never a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from components.merge_adapter import agreement
from components.merge_adapter.candidates import Measured
from components.merge_adapter.merge import Merged
from qlora_retrain.config.evaluate import WRITTEN
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.core import html
from qlora_retrain.evaluation import verdict
from qlora_retrain.evaluation.scoring import RowScore
from qlora_retrain.evaluation.stats import Interval
from qlora_retrain.evaluation.verdict import Rule, Verdict

Numbers = dict[str, float | None]

_COLUMNS = ("loss", "accuracy", "macro_f1", *WRITTEN, "kl", "agreement")
_EXPORTED = ("cost", "loss", "accuracy", *WRITTEN, "agreement")


@dataclass(frozen=True, slots=True)
class Certificate:
    """Everything that is certified.

    Attributes:
        base: What the adapter was added to, and why that.
        why: How it was chosen, in a sentence.
        judged: The rules of the evaluation and those of the merge.
        cost: The loss against the live model, on the rows that certify.
        rows: How many rows chose and how many certify.
        forms: The live model and every candidate: numbers on either half.
        suites: The live model and the one that ships on golden rows and reference text.
        built: What was written.
        exports: Every form that ships: where it lies below `model/`, its size and its numbers.
        serving: What is known against serving the adapter as it is.
    """

    base: str
    why: str
    judged: Verdict
    cost: Rule
    rows: dict[str, int]
    forms: dict[str, dict[str, Numbers]]
    suites: dict[str, dict[str, Numbers]]
    built: Merged
    exports: dict[str, dict[str, Any]]
    serving: list[str]

    def as_json(self) -> dict[str, Any]:
        """`certificate.json`."""
        return {
            "verdict": self.judged.verdict,
            "sentence": self.judged.sentence,
            "base": self.base,
            "why": self.why,
            "rows": self.rows,
            "merge_loss_nats": {"value": self.cost.value, "low": self.cost.low, "high": self.cost.high},
            "forms": self.forms,
            **{suite: found for suite, found in self.suites.items() if found},
            "rules": self.judged.rules_as_json(),
            "built": asdict(self.built),
            "exports": self.exports,
            "serving_warnings": self.serving,
        }

    def page(self) -> str:
        """The same for a person."""
        titles = {"golden": "Golden rows", "reference": "Reference text"}
        return html.page(
            f"Merged model: {self.judged.verdict}",
            self.judged.sentence,
            html.section("Rules", html.table(*verdict.rules_table(self.judged.rules))),
            html.section("What the adapter was added to", self.why, *self._candidates()),
            *(
                html.section(titles[suite], html.table(*verdict.numbers_table(found)))
                for suite, found in self.suites.items()
                if found
            ),
            html.section("What ships", self._exports()),
            html.section(
                "Serving the adapter without merging",
                *(self.serving or ["Nothing is known against it for vLLM, TGI and llama.cpp."]),
            ),
            html.section("What was built", html.numbers({"base": self.base, **asdict(self.built)})),
        )

    def _candidates(self) -> list[html.Html]:
        """A table for each half."""
        titles = {
            "selection": f"{self.rows['selection']} rows to choose on",
            "certification": f"{self.rows['certification']} rows to certify on",
        }
        return [
            html.table(*verdict.numbers_table(self.forms[half], "form", _COLUMNS), caption=title)
            for half, title in titles.items()
            if self.rows[half]
        ]

    def _exports(self) -> html.Html:
        headers, rows = verdict.numbers_table(self.exports, "form", _EXPORTED)
        places = {
            name: ["itself" if e["path"] == "." else e["path"], e["size_bytes"] / 2**20]
            for name, e in self.exports.items()
        }
        return html.table(
            [headers[0], "below model/", "MiB", *headers[1:]],
            [[name, *places[name], *cells] for name, *cells in rows],
            caption=f"on the {self.rows['certification']} rows that certify",
        )


def rules(config: MergeConfig, settings: EvaluateConfig, live: Sequence[RowScore], merged: Measured) -> list[Rule]:
    """The merge's own rules, on the rows that certify."""
    found = [verdict.merge_cost(live, merged.scores, config.max_loss_nats, settings)]
    if config.max_kl_nats is not None:
        value, limit = agreement.kl(merged.agreement, settings), config.max_kl_nats
        text = f"KL from the live model, nats a token: {_said(value)}; its upper end must not lie above {limit:g}"
        found.append(_rule("kl_to_live", text, value, limit, value is not None and value.high <= limit))
    if config.min_agreement is not None:
        value, limit = agreement.greedy(merged.agreement, settings), config.min_agreement
        text = f"tokens chosen as by the live model: {_said(value)}; its lower end must not lie below {limit:g}"
        found.append(_rule("agreement", text, value, limit, value is not None and value.low >= limit))
    return found


def exported(
    config: MergeConfig,
    settings: EvaluateConfig,
    live: Sequence[RowScore],
    name: str,
    found: Measured,
    answers: Mapping[str, str],
) -> tuple[Numbers, list[Rule]]:
    """An export's numbers with what it costs against the live model, and its rule where it has one.

    A form whose loss is not finite is always refused.
    """
    limit = config.max_export_loss_nats
    rule = verdict.merge_cost(live, found.scores, limit or math.inf, settings)
    cost: Numbers = {"cost": rule.value, "cost_low": rule.low, "cost_high": rule.high}
    judged = limit is not None or rule.passed is False
    label = f"export_{name}"
    text = rule.text.replace("lost by merging", f"lost by {name} against the live model")
    rules = [replace(rule, name=label, text=text, limit=limit)] if judged else []
    return numbers(found, settings, answers) | cost, rules


def _rule(name: str, text: str, found: Interval | None, limit: float, passed: bool) -> Rule:
    if found is None:
        return Rule(name, text, limit=limit, passed=False)
    return Rule(name, text, found.value, found.low, found.high, limit, passed)


def enough(config: MergeConfig, rows: Mapping[str, int]) -> list[Rule]:
    """The rule that both halves have rows enough, where halves are used; too few cannot be judged."""
    if config.base != "measured":
        return []
    fewest = min(rows.values())
    text = f"{rows['selection']} rows to choose the base on, {rows['certification']} to certify it on"
    if fewest >= config.min_rows:
        return [Rule("merge_rows", text, fewest, limit=config.min_rows, passed=True)]
    text += f"; {config.min_rows} of each are needed: keep more evaluation rows, or name the base in merge.base"
    return [Rule("merge_rows", text, fewest, limit=config.min_rows)]


def numbers(found: Measured, settings: EvaluateConfig, answers: Mapping[str, str]) -> Numbers:
    """A form's numbers on some rows; none where there are no rows."""
    known = verdict.measure(found.scores, settings, answers)
    for name, value in (("kl", agreement.kl), ("agreement", agreement.greedy)):
        if interval := value(found.agreement, settings):
            known |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return known


def _said(found: Interval | None) -> str:
    return "none that is finite" if found is None else f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"
