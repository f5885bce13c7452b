"""Judge by rows that would be trained on, as a lab does, so that no row of the line's own gate is used up.

Who compares many runs on the evaluation rows chooses the settings that suit these rows, and their verdict then says too
much. So with `data.judge_fraction` a share of the training prompts becomes the evaluation of the data set. The line's
own evaluation and golden rows are on neither side. They still keep their conversations and near-copies out of training.
"""

from __future__ import annotations

from collections.abc import Sequence

from components.validate_data.checks import Row
from components.validate_data.splitting import as_fraction, limit_evaluation
from qlora_retrain.config.data import DataConfig

# With fewer, an accuracy's interval is wider than half of the scale.
MIN_JUDGE_PROMPTS = 10


def judge_by_training_rows(rows: Sequence[Row], golden: Sequence[Row], config: DataConfig) -> None:
    """Make the rows of the side `judge` the evaluation, and leave out the line's own evaluation and golden rows."""
    if config.judge_fraction is None:
        return
    for row in rows:
        if row.split == "eval":
            row.split = "dropped"
    limit_evaluation([(as_fraction(row.prompt_id), row) for row in rows if row.split == "judge"], config)
    for row in golden:
        row.reason = "in_golden_set"
