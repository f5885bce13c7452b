"""Measure an adapter that ships alone as servers load it: over the base in 16 bits, and over the packed one.

The certificate is about the better one of the two. Whoever serves the other one should know what that costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.merge_adapter.form_scores import FormScorer, FormScores
from components.merge_adapter.trials import Choice
from qlora_retrain.config.merge import MergeConfig
from qlora_retrain.lm import base_formats, loading

# The bases by their names among the candidates, with those in `certificate.json`.
_BASES = {"original": "original", "dequantized": "packed"}


def measure(
    config: MergeConfig,
    scorer: FormScorer,
    selected: Choice,
    base_model: Path,
    base_nf4: Path,
    adapter: Path,
    model: Path,
) -> Mapping[str, FormScores]:
    """Return the scores over each base, on the rows that certify; empty where the merged model ships.

    Args:
        config: Whether the merged model ships.
        scorer: Scores forms, and knows the rows that certify.
        selected: The form that was certified, and the others that were scored.
        base_model: The original base.
        base_nf4: The base that was trained over.
        adapter: The adapter that ships.
        model: The folder of the result, for its tokenizer.
    """
    if config.ships_model:
        return {}
    measured = {trial.candidate: trial.scores for trial in selected.trials}
    is_packed = base_formats.from_folder(base_nf4).is_packed
    scores = {}
    for base, name in _BASES.items():
        candidate = replace(selected.winner.candidate, base=base)
        if candidate in measured:
            scores[name] = measured[candidate]
        elif base == "original" or is_packed:
            scores[name] = _score(scorer, name, _load(scorer, base, base_model, base_nf4, adapter), model)
    return scores


def _load(scorer: FormScorer, base: str, base_model: Path, base_nf4: Path, adapter: Path) -> Any:
    if base == "original":
        return loading.attach_adapter(loading.load_base(base_model, **scorer.load_options), adapter)
    return loading.load_trained(base_nf4, adapter, **scorer.load_options)


def _score(scorer: FormScorer, name: str, loaded: Any, model: Path) -> FormScores:
    certifying = set(scorer.unmerged_logits.row_ids)
    rows = [row for row in scorer.rows if row.id in certifying]
    return scorer.score(f"the adapter over the {name} base", loaded, model, rows)
