"""Train the adapter and write it, in a single process or in each of several: the loop, from top to bottom."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from components.train_qlora import adapter, checkpoint, evaluation, history, packing, warm_start
from components.train_qlora.auto_size import resolve_micro_batch_size
from components.train_qlora.batching import eval_batch_size
from components.train_qlora.control import BUDGET_USED_UP, TrainingControl
from components.train_qlora.data import read_rows
from components.train_qlora.loss import mean_loss, summed_loss
from components.train_qlora.methods import Full
from components.train_qlora.optimizer import learning_rate
from components.train_qlora.preflight import overfit_shortest_rows
from components.train_qlora.processes import distributed
from components.train_qlora.processes.memory_error import as_memory_error
from components.train_qlora.report import TrainingResult
from components.train_qlora.trackers import trackers
from components.train_qlora.training_run import ADAPTER_FOLDER, StepBatch, TrainingRun, build_run
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress, signals
from qlora_retrain.core.errors import Cause, TryAgain, UsageError


def train(
    config: TrainConfig,
    dataset: Path,
    base_nf4: Path,
    adapter_folder: Path,
    scratch: Path,
    champion_adapter: Path | None = None,
) -> TrainingResult:
    """Train from the newest checkpoint or from the start, write the adapter, and measure the evaluation loss.

    Raises:
        UsageError: If there is nothing to learn, the settings do not fit the model, or the time budget is used up.
        IntegrityError: If an input is unsafe or damaged.
        Diverged: If a loss or a gradient is not finite, or the loss is hopeless.
        TryAgain: If stopped before the end, after saving a checkpoint.
        MemoryError: If memory runs out, with the numbers.
    """
    start = warm_start.read(champion_adapter, dataset) if champion_adapter else None
    rows = read_rows(config, dataset, base_nf4)
    # The rows are read first, since the message of an out-of-memory error names the longest one.
    with as_memory_error(config, max(rows.train.lengths), scratch), trackers.started(config) as started_trackers:
        run = build_run(config, rows, base_nf4, scratch, started_trackers.log, start)
        run.config = resolve_micro_batch_size(run)
        _resume(run)
        control = TrainingControl(run)
        if run.step < run.total_steps and not run.has_stopped_improving:
            _refuse_useless(run, control)
            run_steps(run, control)
        if run.best_weights is not None:
            adapter.set_weights(run.model, run.best_weights)

        if distributed.is_main():
            adapter.export(run.model, adapter_folder, run.config)
        progress.say(f"optimizer: {run.optimizer.describe()}")
        eval_loss = mean_loss(run.model, rows.eval, rows.pad_token_id, eval_batch_size(run.config))

    return TrainingResult(
        log=run.log,
        optimizer=run.optimizer.describe(),
        eval_loss=eval_loss,
        tokens_per_second=round(control.tokens_per_second, 1) if control.tokens else None,
        peak_rss_mib=round(distributed.all_reduce_sum(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)[0]),
        layers=adapter.trainable_by_layer(run.model),
        ranks=adapter.ranks(run.model, run.optimizer.method),
        train_rows=len(rows.train),
        eval_rows=len(rows.eval),
    )


def _resume(run: TrainingRun) -> None:
    """Go on from the newest valid checkpoint, if there is one."""
    # Every process must resume from the same checkpoint, so one of them chooses it.
    if newest := distributed.broadcast(lambda: checkpoint.newest(run)):
        progress.say(f"resuming from {newest.name} of {run.total_steps} steps")
        checkpoint.restore(run, newest)
        evaluation.finish_interrupted(run)


def _refuse_useless(run: TrainingRun, control: TrainingControl) -> None:
    """Refuse to begin where the run must stop at once, or cannot learn."""
    if signals.stop_requested():
        raise TryAgain("asked to stop before the first step; run it again", cause=Cause.PREEMPTED)
    if not run.step:
        optimizer = run.optimizer if isinstance(run.optimizer.method, Full) else None
        overfit_shortest_rows(run.model, run.config, run.rows.train, run.rows.pad_token_id, run.total_steps, optimizer)
    # The time budget counts all attempts, so a retry does not extend it.
    if control.is_budget_used_up(control.earlier_seconds):
        raise _stopped(run, BUDGET_USED_UP)


def run_steps(run: TrainingRun, control: TrainingControl) -> None:
    """Run the remaining optimizer steps.

    Raises:
        Diverged: If a loss or a gradient is not finite, or the loss is hopeless.
        UsageError: If the time budget is used up; after saving.
        TryAgain: If asked to stop before the last step; after saving.
    """
    is_alone = distributed.world_size() == 1
    forward = run.model if is_alone else distributed.ForwardThroughDDP(run.model, run.config.device)
    run.model.train()
    run.optimizer.begin()
    control.begin()
    steps = run.remaining_steps()
    for step in steps:
        control.begin_step()
        run.begin_step()
        numbers = _train_step(run, forward, step, steps.look_ahead)
        run.step += 1
        due = control.end_step()

        run.add_to_log({**numbers, **control.step_metrics(numbers["tokens"])})
        control.report_progress(run.log[-1])
        vocab_size = run.model.config.get_text_config().vocab_size
        if reason := history.hopeless_training_loss(run.log, vocab_size):
            raise run.divergence(run.step, reason)

        if due.evaluate:
            try:
                is_best = evaluation.evaluate(run, step.row_indices)
            except TryAgain:  # the optimizer step is complete: save it, and evaluate when the run is resumed
                control.stop_reason = "asked to stop"
                due.save = due.stop = True
            else:
                # Even if the run fails later, the best adapter can be used.
                due.save |= is_best or run.has_stopped_improving
                due.stop |= run.has_stopped_improving
        if due.save:
            checkpoint.save(run)
        if due.stop:
            break
    if control.stop_reason:
        raise _stopped(run, control.stop_reason)


def _train_step(
    run: TrainingRun, forward: Any, step: StepBatch, prepare_next_step: Callable[[], None]
) -> dict[str, Any]:
    """Run one optimizer step: forward and backward over its micro-batches; clip; update.

    Args:
        run: The run.
        forward: The model, or DDP's around it.
        step: The rows that this process has in the step.
        prepare_next_step: Is called while a GPU still computes this one.

    Returns:
        The step's numbers for the log, those of all processes together.

    Raises:
        Diverged: If the loss or the norm of the gradients is not finite; a NaN must not reach the optimizer.
    """
    model, config, losses = run.model, run.config, []
    with packing.packed_attention(model):  # also around backward, which recomputes checkpointed layers
        for i, micro_batch in enumerate(step.micro_batches):
            # DDP sums the gradients over the processes once, in the last backward pass.
            is_last = i == step.num_micro_batches - 1
            with nullcontext() if is_last or forward is model else forward.no_sync():
                # DDP divides the sum by the number of processes, so the loss is multiplied by it.
                loss = summed_loss(forward, micro_batch) * distributed.world_size() / step.supervised_tokens
                losses.append(loss.detach())
                penalty = run.optimizer.method.penalty(run.optimizer.parameters) if is_last else None
                (loss if penalty is None else loss + penalty).backward()
            del loss, penalty, micro_batch  # and with them what the backward pass kept, before the next forward pass

    run.optimizer.collect_gradients()
    norm = torch.nn.utils.clip_grad_norm_(run.optimizer.parameters.values(), config.max_grad_norm)
    prepare_next_step()
    # The CPU waits for the GPU here, once a step.
    own_values = torch.stack([torch.stack(losses).sum(), norm.detach()]).tolist()
    loss_and_norm = [total / distributed.world_size() for total in distributed.all_reduce_sum(*own_values)]
    for label, value in zip(("loss", "gradient norm"), loss_and_norm, strict=True):
        if not math.isfinite(value):
            raise run.divergence(run.step + 1, f"the {label} is {value}", step.row_indices)

    rate = learning_rate(config, run.step, run.total_steps)
    run.optimizer.step(rate)
    return {
        "loss": loss_and_norm[0], "grad_norm": loss_and_norm[1], "learning_rate": rate, "tokens": step.tokens,
        "supervised_tokens": step.supervised_tokens,
    }  # fmt: skip


def _stopped(run: TrainingRun, reason: str) -> UsageError | TryAgain:
    """Return the error that ends an attempt before the last step, after saving."""
    is_over_budget = reason == BUDGET_USED_UP
    # A retry has the same budget, and would end at once.
    return (UsageError if is_over_budget else TryAgain)(
        f"step {run.step} of {run.total_steps}, saved as checkpoint-{run.step}: {reason}. "
        f"Its {ADAPTER_FOLDER}/ is a complete adapter{run.best_adapter_clause}",
        cause=Cause.TIME_BUDGET if is_over_budget else Cause.PREEMPTED,
    )
