"""Evaluate during training: keep the best adapter, end a run that gets worse, finish what an attempt was stopped in."""

from __future__ import annotations

import time

from components.train_qlora import adapter, checkpoint, history
from components.train_qlora.batching import eval_batch_size
from components.train_qlora.loss import mean_loss
from components.train_qlora.training_run import TrainingRun
from qlora_retrain.core import progress
from qlora_retrain.core.errors import Cause, TryAgain


def evaluate(run: TrainingRun, row_indices: list[int]) -> bool:
    """Measure the evaluation loss, and keep the adapter if it is the best so far; return whether it is.

    Raises:
        Diverged: If the loss gets worse and worse.
        TryAgain: If asked to stop before the end of the evaluation.
    """
    try:
        loss = mean_loss(run.model, run.rows.eval, run.rows.pad_token_id, eval_batch_size(run.config))
    finally:
        run.model.train()
    assert loss is not None

    earlier_losses = [eval_loss for _, eval_loss in history.eval_losses(run.log)]
    run.add_to_log({"eval_loss": loss, "time": time.time()})
    is_best = not earlier_losses or loss < min(earlier_losses)
    if is_best:
        run.best_weights = adapter.copy_weights(run.model)
    if reason := history.hopeless_eval_loss(earlier_losses, loss, run.config):
        raise run.divergence(run.step, reason, row_indices)
    if run.has_stopped_improving:
        times = f"{run.config.early_stopping_patience} evaluations"
        progress.say(f"step {run.step}: the loss has not improved for {times}, so training ends")
    return is_best


def finish_interrupted(run: TrainingRun) -> None:
    """Evaluate the checkpoint's step where the last attempt was stopped during that evaluation, after saving."""
    if run.step in run.eval_at_steps and run.step not in dict(history.eval_losses(run.log)):
        try:
            evaluate(run, [])
        except TryAgain as stopped:
            message = f"step {run.step} of {run.total_steps}, already saved: asked to stop"
            raise TryAgain(message, cause=Cause.PREEMPTED) from stopped
        checkpoint.save_evaluation(run)
