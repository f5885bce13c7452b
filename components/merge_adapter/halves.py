"""Part rows and passages: one half chooses the form that ships, the other half certifies it.

What chooses makes the form look too good, so it must not certify it. Where there is nothing to choose, or too little
to choose on, all of them certify.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from components.merge_adapter.evaluation_inputs import EvaluationInputs
from qlora_retrain.config.merge import MergeConfig
from qlora_retrain.evaluation.rows import Row, RowScore, count_prompts
from qlora_retrain.evaluation.rules import forgetting_rule
from qlora_retrain.evaluation.rules.comparison import has_metric


@dataclass(frozen=True, slots=True)
class Halves:
    """The ids of what chooses and of what certifies; where nothing is chosen, the first is empty."""

    selection: frozenset[str]
    certification: frozenset[str]

    @classmethod
    def from_groups(cls, ids_by_key: Mapping[str, Iterable[str]], prefix: str) -> Halves:
        """Part groups by a hash of their keys; each group is in one half, and always in the same."""
        keys = sorted(ids_by_key, key=lambda key: hashlib.sha256(f"{prefix}:{key}".encode()).digest())
        first = frozenset(i for key in keys[: len(keys) // 2] for i in ids_by_key[key])
        return cls(first, frozenset(i for ids in ids_by_key.values() for i in ids) - first)

    @classmethod
    def without_selection(cls, rows: Iterable[Row | RowScore]) -> Halves:
        """Let all certify."""
        return cls(frozenset(), frozenset(row.id for row in rows))

    def as_dict(self) -> dict[str, frozenset[str]]:
        """Return both by their names in `certificate.json`."""
        return {"selection": self.selection, "certification": self.certification}


@dataclass(frozen=True, slots=True)
class Parts:
    """What chooses and what certifies.

    Attributes:
        rows: The evaluation rows.
        passages: The passages of reference text.
        needs_rows: Whether the choice needs rows of a half, so that too few of them are insufficient evidence.
        strength_reason: Why no strength is chosen although `merge.strength` is `measured`; empty where one is, or
            where nothing limits what the model forgets.
    """

    rows: Halves
    passages: Halves
    needs_rows: bool
    strength_reason: str

    @classmethod
    def from_inputs(cls, config: MergeConfig, inputs: EvaluationInputs, *, has_soup: bool = False) -> Parts:
        """Part the rows and the passages of an evaluation, for the choices that the settings leave open.

        Args:
            config: The settings.
            inputs: The rows and the scores.
            has_soup: Whether there are earlier adapters to average this run's with.
        """
        passages, reason = _part_passages(config, inputs)
        rows = inputs.rows["eval"]
        needs_rows = config.base == "measured" or config.rank == "smallest"
        # A strength is chosen by passages; by rows too, where there are enough. An average is chosen by rows alone.
        has_rows = (bool(passages.selection) or has_soup) and count_prompts(rows) // 2 >= config.min_prompts
        halves = split_rows(rows) if needs_rows or has_rows else Halves.without_selection(rows)
        return cls(halves, passages, needs_rows, reason)


def split_rows(rows: Sequence[Row]) -> Halves:
    """Part rows into halves of their prompts, since prompts are what an interval counts."""
    ids_by_prompt: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        ids_by_prompt[row.prompt].append(row.id)
    # Hashed once more, so that the halves do not depend on how ids are made.
    return Halves.from_groups({min(ids): ids for ids in ids_by_prompt.values()}, "merge")


def split_passages(passages: Sequence[RowScore]) -> Halves:
    """Part passages into halves of their prompts, by the prompts' ids; a text is a prompt of its own."""
    ids_by_prompt: dict[str, list[str]] = defaultdict(list)
    for passage in passages:
        ids_by_prompt[passage.prompt].append(passage.id)
    return Halves.from_groups(ids_by_prompt, "forgetting")


def _part_passages(config: MergeConfig, inputs: EvaluationInputs) -> tuple[Halves, str]:
    """Return the halves of the passages, and why all certify although a strength should be measured."""
    passages = inputs.unmerged_scores("reference")
    everything = Halves.without_selection(passages)
    limits = forgetting_rule.limits(inputs.scores, inputs.settings)
    if config.strength != "measured" or not limits:
        return everything, ""

    # A passage without a token that is judged is no evidence in either half.
    halves = split_passages([p for p in passages if all(has_metric(p, metric) for metric in limits)])
    counts = [count_prompts(p for p in passages if p.id in ids) for ids in halves.as_dict().values()]
    if min(counts) < forgetting_rule.MIN_PASSAGES:
        return everything, (
            f"passages of reference text of {sum(counts)} different prompts are too few to choose a strength on one "
            f"half and certify it on the other, of at least {forgetting_rule.MIN_PASSAGES} each"
        )
    return halves, ""
