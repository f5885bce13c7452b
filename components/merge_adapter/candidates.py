"""Build, score and select the candidates: the adapter merged into either base. The better one ships.

A form is a version of the model: a candidate, or an export of the selected one. Every form is compared with the
unmerged model, the 4-bit base with the adapter over it; `certificate.json` and the manifest call that one `live`. One
form is in memory at a time, and the unmerged model beside none of them.

Neither base is better in general: the adapter was trained over the 4-bit values, and these approximate the original
ones. So both are merged and scored. One half of the evaluation rows selects, the other half certifies the selection.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.merge_adapter.agreement import Agreement, UnmergedLogits
from components.merge_adapter.chat_files import write_chat_files
from components.merge_adapter.merge import MergeStats, merge
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.core import progress
from qlora_retrain.evaluation import answer_endings, scoring
from qlora_retrain.evaluation.rows import count_prompts
from qlora_retrain.evaluation.scoring import Row, RowScore, ScoringOptions
from qlora_retrain.lm import chat, loading
from qlora_retrain.lm.chat import ChatTokenizer
from qlora_retrain.lm.generation import Completion
from qlora_retrain.lm.loading import LoadOptions

BASES = ("dequantized", "original")  # with equal losses the first ships, as it computes what was evaluated
_FOLDER = "candidates"


@dataclass(frozen=True, slots=True)
class FormScores:
    """The scores of one form of the merged model on the evaluation rows, and its agreement with the unmerged model."""

    scores: list[RowScore]
    agreement: list[Agreement]

    def subset(self, ids: frozenset[str]) -> FormScores:
        """Return the scores of the rows with these ids."""
        return FormScores([s for s in self.scores if s.id in ids], [a for a in self.agreement if a.id in ids])

    def with_endings(self, answers: Mapping[str, Completion]) -> FormScores:
        """Return the scores with what the answers, by row id, show: whether they ended by themselves."""
        return FormScores(answer_endings.with_endings(self.scores, answers), self.agreement)

    @property
    def loss(self) -> float:
        """Return the loss in nats per token; infinite where the loss of a row is not finite."""
        # Infinite, so that a form with a broken row is never selected.
        total, tokens = sum(s.loss_nats for s in self.scores), sum(s.tokens for s in self.scores)
        return total / tokens if tokens and math.isfinite(total) else math.inf


@dataclass(frozen=True, slots=True)
class FormScorer:
    """Scores every form of the merged model in the same way.

    Attributes:
        unmerged_logits: With which a form is compared; they are of the rows that certify.
        rows: The evaluation rows; all are scored.
        labels: The closed set of answers, or None.
        load_options: The options with which models are loaded: device, attention implementation, dtype.
        settings: The evaluation's settings: the metrics, and the tokens of a forward pass.
    """

    unmerged_logits: UnmergedLogits
    rows: Sequence[Row]
    labels: Sequence[str] | None
    load_options: LoadOptions
    settings: EvaluateConfig

    def score(
        self, name: str, model: Any, folder: Path, rows: Sequence[Row] | None = None, *, measure_endings: bool = False
    ) -> FormScores:
        """Score a loaded form, and compare it with the unmerged model.

        Args:
            name: The form's name in the progress line.
            model: The loaded form.
            folder: A model folder with the form's tokenizer.
            rows: The rows to score; all evaluation rows where None.
            measure_endings: Measure whether its answers end by themselves, which takes longer.
        """
        tokenizer, rows = chat.load_tokenizer(folder), self.rows if rows is None else rows
        options = ScoringOptions(measure_endings=measure_endings)
        scores, _ = scoring.score_and_generate(
            self.settings, model, tokenizer, rows, self.labels, options, description=f"scoring {name}"
        )

        description = f"comparing {name} with the unmerged model"
        return FormScores(scores, self.unmerged_logits.compare(model, description))


def resolve_base(
    config: MergeConfig, rows: Sequence[Row], *, is_packed: bool = True, is_adapter: bool = True
) -> tuple[MergeConfig, str]:
    """Return the settings without `base: auto`, and why one base was taken unmeasured; empty where both are measured.

    Args:
        config: The line's settings.
        rows: The evaluation rows.
        is_packed: Whether the adapter was trained over other values than the original ones.
        is_adapter: Whether there is an adapter to merge, and not all weights trained.
    """
    if not is_adapter:
        reason = "original: all weights trained (train.method: full), so they ship as they are, and nothing was merged"
        return config.model_copy(update={"base": "original"}), reason
    if not is_packed:
        reason = (
            "original: the adapter was trained over its 16-bit weights (quantize.format: none), so there is no other"
        )
        return config.model_copy(update={"base": "original"}), reason
    if config.base != "auto":
        reason = f"{config.base}, as merge.base sets it; no measurement selected it"
        return config, "" if config.base == "measured" else reason

    # With fewer prompts than one half needs, nothing can be certified, and `measured` refuses for that.
    prompts = count_prompts(rows)
    base = "dequantized" if prompts // 2 < config.min_prompts <= prompts else "measured"
    reason = (
        f"{base}, which computes what was evaluated: evaluation rows of {prompts} different prompts are too few to "
        f"select on one half and certify on the other, of at least {config.min_prompts} prompts each "
        "(merge.min_prompts), so all of them certify it"
    )
    return config.model_copy(update={"base": base}), "" if base == "measured" else reason


def build_candidates(
    config: MergeConfig, base_model: Path, base_nf4: Path, adapter: Path, tokenizer: ChatTokenizer, model: Path
) -> dict[str, MergeStats]:
    """Write every candidate into a folder of its own below `model`, complete with the line's chat files."""
    stats = {}
    for name in BASES if config.base == "measured" else (config.base,):
        # Below the model folder, so that keeping the winner is a rename and not a copy of gigabytes.
        folder = model / _FOLDER / name
        folder.mkdir(parents=True)
        stats[name] = merge(
            base_model,
            base_nf4,
            adapter,
            folder,
            dequantized=name == "dequantized",
            max_shard_gib=config.max_shard_gib,
        )
        write_chat_files(folder, tokenizer)
        progress.say(f"{name}: merged {stats[name].modules} modules, {stats[name].weights_bytes / 2**30:.2f} GiB")
    return stats


def score_candidates(scorer: FormScorer, names: Iterable[str], model: Path) -> dict[str, FormScores]:
    """Score the candidates, one in memory at a time."""
    results = {}
    for name in names:
        folder = model / _FOLDER / name
        loaded = loading.load_base(folder, **scorer.load_options)
        results[name] = scorer.score(name, loaded, folder)
        del loaded  # before the next one is loaded
    return results


def split_halves(rows: Sequence[Row]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the ids of the rows that select and of those that certify; a row is always in the same half.

    Each half has half of the prompts, since prompts are what its interval counts, with all their rows.
    """
    ids_by_prompt: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        ids_by_prompt[row.prompt].append(row.id)

    # Hashed once more, so that the halves do not depend on how ids are made.
    groups = sorted(ids_by_prompt.values(), key=lambda ids: hashlib.sha256(f"merge:{min(ids)}".encode()).digest())
    selection = frozenset(row_id for ids in groups[: len(groups) // 2] for row_id in ids)
    return selection, frozenset(row.id for row in rows) - selection


def lowest_loss(candidates: Mapping[str, FormScores], ids: frozenset[str]) -> str:
    """Return the candidate with the lowest loss on these rows, the first among equals.

    The loss decides for label tasks too. Two forms of one model differ in the answers to at most one or two rows of a
    hundred, but in the loss of every row.
    """
    return min(candidates, key=lambda name: candidates[name].subset(ids).loss)


def keep_winner(winner: str, model: Path) -> None:
    """Move the winner's files into `model`, and remove the other candidates."""
    for path in (model / _FOLDER / winner).iterdir():
        path.rename(model / path.name)
    shutil.rmtree(model / _FOLDER)
