"""Check before a run that the machine has what it needs, and that the model can learn a few short rows."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from components.train_qlora import adapter, liger, packing
from components.train_qlora.batching import micro_batch_size
from components.train_qlora.data import Batch, PaddingCollator, TokenizedDataset
from components.train_qlora.loss import summed_loss, supervised_mask
from components.train_qlora.optimizer import AdapterOptimizer
from components.train_qlora.processes import distributed
from components.train_qlora.trackers import keys
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress, signals
from qlora_retrain.core.errors import Cause, TryAgain, UsageError

NUM_ROWS = 8  # the shortest ones
MAX_STEPS = 40
# Fractions of the first loss. At a tenth the rows are memorized, so the check stops. A loss above 98 % of the first one
# may be rounding, since bf16 rounds by up to a hundredth.
LEARNT_FRACTION = 0.1
FALLEN_FRACTION = 0.98
# The check is skipped where it would cost more than this fraction of the run's tokens.
MAX_TOKENS_FRACTION = 0.05


def check_environment(config: TrainConfig) -> None:
    """Check that the machine has what the settings need, before anything is read.

    Raises:
        UsageError: If a GPU or a package is missing.
    """
    if config.kernels == "liger" and not liger.IS_INSTALLED:
        raise UsageError("train.kernels: liger-kernel is not installed where the step runs; install it, or set `torch`")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "train.device is cuda, but torch sees no GPU here; make the plan on a machine like the one that trains"
        )
    if config.device == "cuda" and torch.cuda.device_count() < config.num_processes:
        raise UsageError(
            f"train.num_processes: {config.num_processes} processes need one GPU each, but torch sees "
            f"{torch.cuda.device_count()} here; give the step more GPUs, or set fewer processes"
        )

    for tracker in config.report_to:
        keys.refuse_unready(tracker)


def overfit_shortest_rows(
    model: Any,
    config: TrainConfig,
    dataset: TokenizedDataset,
    pad_token_id: int,
    total_steps: int,
    optimizer: AdapterOptimizer | None = None,
) -> None:
    """Train on one batch of the shortest rows, then restore the adapter and the random state.

    Args:
        model: The model with its fresh adapter.
        config: The settings, of which the check uses the learning rate, the clipping and the micro-batch size.
        dataset: The training rows.
        pad_token_id: The token to pad with.
        total_steps: Optimizer steps of the real run, from which the check's budget is computed.
        optimizer: The run's, new, where all weights train: another one of that size would not fit beside it. It is new
            again afterwards.

    Raises:
        UsageError: If the loss does not fall.
        TryAgain: If asked to stop.
    """
    shortest = sorted(range(len(dataset)), key=lambda i: dataset.lengths[i])[:NUM_ROWS]
    # One forward pass more than there are steps, to measure the loss after the last step.
    cost_tokens = (MAX_STEPS + 1) * sum(dataset.lengths[i] for i in shortest)
    run_tokens = total_steps * config.global_batch_size * sum(dataset.lengths) / len(dataset)
    if cost_tokens > MAX_TOKENS_FRACTION * run_tokens:
        progress.say(
            f"preflight skipped: its {cost_tokens} tokens are more than {MAX_TOKENS_FRACTION:.0%} of the run's "
            f"{run_tokens:.0f}"
        )
        return

    # The run must end with the same bytes, with or without this check.
    weights_before, random_state = adapter.copy_weights(model), torch.get_rng_state()
    if config.start == "champion":
        _forget(model)
    losses = _train_on_batch(model, config, PaddingCollator(pad_token_id)([dataset[i] for i in shortest]), optimizer)
    adapter.set_weights(model, weights_before)
    if optimizer:
        optimizer.reset()
    torch.set_rng_state(random_state)

    first_loss, lowest_loss = losses[0], min(losses[1:])
    # A NaN fails this comparison too.
    if not lowest_loss <= FALLEN_FRACTION * first_loss:
        raise UsageError(
            f"preflight: the model does not learn. In {len(losses) - 1} steps over the {len(shortest)} shortest rows "
            f"the loss went from {first_loss:.3f} to no less than {lowest_loss:.3f} nats per token. Check "
            f"train.learning_rate ({config.learning_rate:g}), the loss mask (which tokens are supervised), the chat "
            "template and the tokenizer"
        )
    progress.say(
        f"preflight: {len(shortest)} rows, loss {first_loss:.3f} to {lowest_loss:.3f} in {len(losses) - 1} steps"
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def _forget(model: Any) -> None:
    """Bring the adapter to where it changes nothing: what the champion has learnt could not be learnt again."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.zero_()


def _train_on_batch(model: Any, config: TrainConfig, batch: Batch, optimizer: AdapterOptimizer | None) -> list[float]:
    """Return the mean loss before the first step and after each."""
    # Eval mode turns dropout off, whose noise could hide the fall of the loss.
    model.eval()
    for layer in model.modules():
        # Activation checkpointing is off in eval mode, and the check would then take more memory than the run.
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
    trainable = [p for p in model.parameters() if p.requires_grad]
    adamw = None
    if optimizer is None:
        adamw = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=0.0)
    else:
        trainable = list(optimizer.parameters.values())

    count = packing.num_micro_batches(
        batch, micro_batch_size(config), is_packed=packing.can_pack(model), backend=packing.backend(model)
    )
    micro_batches = packing.split_batch(batch, count)

    losses: list[float] = []
    for step in range(MAX_STEPS + 1):
        if signals.stop_requested():
            raise TryAgain("asked to stop before the first step; run it again", cause=Cause.PREEMPTED)
        loss = _backward(model, micro_batches, int(supervised_mask(batch).sum()))
        # Every rank trains on the same rows; the mean makes all of them stop after the same step.
        losses.append(distributed.all_reduce_sum(loss)[0] / distributed.world_size())
        if step == MAX_STEPS or losses[-1] < LEARNT_FRACTION * losses[0]:
            break
        if optimizer:
            optimizer.collect_gradients()
        torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
        if optimizer:
            optimizer.step(config.learning_rate)
        elif adamw:
            adamw.step()
            adamw.zero_grad()
    model.zero_grad()
    if optimizer:
        optimizer.adamw.zero_grad()
    return losses


def _backward(model: Any, micro_batches: list[Batch], supervised_tokens: int) -> float:
    """Accumulate the gradients over the micro-batches and return the mean loss."""
    total_loss = 0.0
    with packing.packed_attention(model):
        for micro_batch in micro_batches:
            loss = summed_loss(model, micro_batch) / supervised_tokens
            loss.backward()
            total_loss += loss.item()
    return total_loss
