"""Measure the unmerged model, the 4-bit base with the adapter over it, before any form is loaded.

What the forms are compared with outlives it: its scores, and its logits in a file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from components.merge_adapter.agreement import UnmergedLogits
from components.merge_adapter.evaluation_inputs import EvaluationInputs
from components.merge_adapter.form_scores import FormScorer
from components.merge_adapter.halves import Parts
from qlora_retrain.config.merge import MergeConfig
from qlora_retrain.core import progress
from qlora_retrain.evaluation import reference_text, scoring
from qlora_retrain.lm import loading
from qlora_retrain.lm.chat import ChatTokenizer
from qlora_retrain.lm.loading import LoadOptions


def measure(
    config: MergeConfig,
    inputs: EvaluationInputs,
    parts: Parts,
    base_nf4: Path,
    adapter: Path,
    tokenizer: ChatTokenizer,
    logits_file: BinaryIO,
) -> tuple[EvaluationInputs, FormScorer]:
    """Measure the unmerged model, and drop it.

    Args:
        config: The device and the precision.
        inputs: The rows and the scores of the evaluation.
        parts: What certifies: on these rows forms are compared with the unmerged model; and the passages that choose.
        base_nf4: The base that was trained over.
        adapter: The adapter.
        tokenizer: The line's.
        logits_file: An empty file for the unmerged model's logits, which the scorer reads.

    Returns:
        The inputs, with scores on the device and in the precision of the forms, and the scorer of the forms.
    """
    load_options: LoadOptions = {
        "device": config.device,
        "attn_implementation": scoring.attn_implementation(config.device),
        "dtype": config.precision,
    }
    unmerged: Any = loading.load_trained(base_nf4, adapter, **load_options)
    inputs = _rescore(config, inputs, unmerged, tokenizer)
    settings, rows = inputs.settings, inputs.rows["eval"]
    compared = [row for row in rows if row.id in parts.rows.certification]
    logits = UnmergedLogits.from_model(unmerged, tokenizer, compared, settings.batch_tokens, logits_file)
    progress.say(logits.sentence)

    # The model ends here, before any form is loaded.
    passages = [p for p in inputs.passages if reference_text.passage_id(p) in parts.passages.selection]
    scorer = FormScorer(logits, rows, inputs.labels, load_options, settings, passages, inputs.max_tokens)
    return inputs, scorer


def _rescore(
    config: MergeConfig, inputs: EvaluationInputs, unmerged: Any, tokenizer: ChatTokenizer
) -> EvaluationInputs:
    """Return the inputs with the unmerged model scored on the device and in the precision of the merged forms.

    Otherwise the cost of merging would include the effect of another precision, as where a GPU evaluates and a CPU
    merges.
    """
    settings, rows = inputs.settings, inputs.rows["eval"]
    if (settings.device, settings.precision) == (config.device, config.precision):
        return inputs

    # The other contestants are not loaded here, so they keep their scores from the evaluation.
    scores, _ = scoring.score_and_generate(
        settings, unmerged, tokenizer, rows, inputs.labels, description="scoring the unmerged model again"
    )
    other_suites = [score for score in inputs.scores["challenger"] if score.suite != "eval"]
    return replace(inputs, scores={**inputs.scores, "challenger": [*scores, *other_suites]})
