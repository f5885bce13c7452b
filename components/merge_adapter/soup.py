"""Say whether the mean of this run's adapter and of earlier versions' is a form to try, and whether it is better.

Such a mean is called a soup (Wortsman et al., arXiv 2203.05482; of adapters Chronopoulou et al., arXiv 2302.07027).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components.merge_adapter.halves import Parts
from components.merge_adapter.trials import Trial
from qlora_retrain.config.merge import MergeConfig


def obstacle(earlier: Sequence[Path], parts: Parts) -> str | None:
    """Return why there is nothing to try; None where there is."""
    if not earlier:
        return "the line has no earlier version that fits: accepted, and over the same base and layers"
    if not parts.rows.selection:
        return "the evaluation rows are too few to choose on one half and certify on the other (merge.min_prompts)"
    return None


def standing(trial: Trial) -> tuple[bool, float]:
    """Return what is smaller for the better form: within the limits on forgetting first, then the loss."""
    return not trial.is_within_limits, trial.loss


def describe(config: MergeConfig, earlier: Sequence[Path], mean: Trial, own: Trial, *, is_better: bool) -> str:
    """Return which of both ships, and why."""
    versions = ", ".join(path.parent.name for path in earlier)
    few = f", all that fit of merge.soup: {config.soup}" if len(earlier) + 1 < (config.soup or 0) else ""
    losses = f"{mean.loss:.4f} and {own.loss:.4f} nats per token on the rows that select"
    limits = "".join(
        f"; {name} forgets more than the limits allow"
        for name, trial in (("the mean", mean), ("this run's own", own))
        if not trial.is_within_limits
    )
    ships = "the mean ships" if is_better else "this run's own adapter ships"
    return (
        f"{ships}: the mean of {len(earlier) + 1} adapters (this run's and those of {versions}{few}) and this run's "
        f"own have a loss of {losses}{limits}"
    )
