"""Extend transformers' Trainer with our loss, order of rows, checkpoints and reasons to stop."""

from __future__ import annotations

import math
import os
import shutil
import time
from contextlib import nullcontext
from errno import ENOSPC
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer_callback import PrinterCallback

from components.train_qlora import adapter, distributed, divergence, history, packing, resume
from components.train_qlora.batching import eval_batch_size
from components.train_qlora.control import BUDGET_USED_UP, TrainingControl
from components.train_qlora.data import (
    Batch,
    DistributedBatchSampler,
    LengthGroupedSampler,
    PaddingCollator,
    TokenizedDataset,
)
from components.train_qlora.loss import mean_loss, summed_loss, supervised_mask
from components.train_qlora.preflight import overfit_shortest_rows
from components.train_qlora.resume import ADAPTER_FOLDER, BEST_FOLDER, STATE_FILE
from components.train_qlora.trainer_arguments import num_training_steps, training_arguments
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress, signals
from qlora_retrain.core.errors import Cause, Diverged, TryAgain, UsageError
from qlora_retrain.lm import checkpoints

MAX_CHECKPOINTS = 2
MIN_FREE_BYTES = 2**20  # with less free space than this, a failed save is blamed on the full disk


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Train the adapter of a `PeftModel` on tokenized rows; one device per process, alone or with others."""

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the supervised tokens of the whole optimizer step

    def __init__(
        self,
        model: PeftModel,
        config: TrainConfig,
        train_dataset: TokenizedDataset,
        eval_dataset: TokenizedDataset,
        pad_token_id: int,
        scratch: Path,
    ) -> None:
        self.config, self.pad_token_id, self.scratch = config, pad_token_id, scratch
        self.training_control = TrainingControl(config, num_training_steps(config, len(train_dataset)))
        self.sampler = LengthGroupedSampler(train_dataset.lengths, config.global_batch_size, config.seed)
        self.batch_sampler = DistributedBatchSampler(self.sampler, distributed.rank(), distributed.world_size())
        args = training_arguments(config, self.training_control.total_steps, scratch)
        args._n_gpu = min(args.n_gpu, 1)  # a process gets one GPU; DataParallel does not know 4-bit weights

        distributed.exclude_frozen_from_ddp(model)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
            data_collator=PaddingCollator(pad_token_id), callbacks=[self.training_control],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)

        # The next three belong to the optimizer step that is being computed.
        self.step_tokens: dict[str, int] = {}
        self.step_row_indices: list[int] = []
        self.step_loss = torch.zeros(())
        self.best_weights: dict[str, torch.Tensor] | None = None  # those with the lowest evaluation loss so far

    def train_or_resume(self) -> None:
        """Train to the last step, from the newest valid checkpoint if there is one.

        Raises:
            Diverged: If a loss or a gradient is not finite, or the loss is hopeless.
            TryAgain: If the run stopped before its last step, after saving.
        """
        # Every process must resume from the same checkpoint, so one of them chooses it.
        newest = distributed.broadcast(self._newest_checkpoint)
        first_step, total_steps = checkpoints.step_of(newest) if newest else 0, self.training_control.total_steps
        if newest:
            progress.say(f"resuming from {newest.name} of {total_steps} steps")
            self._load_from_checkpoint(str(newest))
            self.state = TrainerState.load_from_json(str(newest / STATE_FILE))
            self._run_interrupted_evaluation(newest, first_step)

        if not newest or not (first_step >= total_steps or self._has_stopped_improving()):
            if signals.stop_requested():
                raise TryAgain("asked to stop before the first step; run it again", cause=Cause.PREEMPTED)
            if not newest:
                overfit_shortest_rows(self.model, self.config, self.train_dataset, self.pad_token_id, total_steps)

            # The time budget counts all attempts, so a retry does not extend it.
            if self.training_control.is_budget_used_up(history.training_seconds(self.state.log_history)):
                self.training_control.stop_reason = BUDGET_USED_UP
            else:
                self.train(resume_from_checkpoint=str(newest) if newest else None)
            if stop_reason := self.training_control.stop_reason:
                step, is_over_budget = self.state.global_step, stop_reason == BUDGET_USED_UP
                # A retry has the same budget, and would end at once.
                raise (UsageError if is_over_budget else TryAgain)(
                    f"step {step} of {total_steps}, saved as checkpoint-{step}: {stop_reason}. "
                    f"Its {ADAPTER_FOLDER}/ is a complete adapter{self._best_adapter_clause()}",
                    cause=Cause.TIME_BUDGET if is_over_budget else Cause.PREEMPTED,
                )
        if self.best_weights is not None:
            adapter.set_weights(self.model, self.best_weights)

    def _best_adapter_clause(self) -> str:
        """Return the part of a message that names the best adapter; empty where nothing was evaluated."""
        step = history.best_step(self.state.log_history)
        return (
            f"; its {BEST_FOLDER}/ is the adapter of step {step}, with the lowest evaluation loss"
            if step is not None
            else ""
        )

    def _newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that verifies and can be loaded, and delete the newer ones."""
        newest = checkpoints.newest_valid(self.scratch, lambda folder: resume.unusable_reason(self, folder))
        for folder in checkpoints.sorted_checkpoints(self.scratch):
            if newest is None or checkpoints.step_of(folder) > checkpoints.step_of(newest):
                shutil.rmtree(folder)  # its step will be computed and saved again
        history.note_first_step(self.scratch, checkpoints.step_of(newest) if newest else 0)
        return newest

    def _run_interrupted_evaluation(self, newest: Path, step: int) -> None:
        """Evaluate the checkpoint's step where the last attempt was stopped during that evaluation, after saving."""
        training_control = self.training_control
        losses_by_step = dict(history.eval_losses(self.state.log_history))
        if step in training_control.eval_at_steps and step not in losses_by_step:
            self._evaluate()
            if training_control.stop_reason:
                raise TryAgain(
                    f"step {step} of {training_control.total_steps}, already saved: {training_control.stop_reason}",
                    cause=Cause.PREEMPTED,
                )
            if distributed.is_main():
                self.state.save_to_json(str(newest / STATE_FILE))
            self._finalize_checkpoint(newest, step)

    def _finalize_checkpoint(self, folder: Path, step: int) -> None:
        """Write the best weights and the marker of a checkpoint, once every process has written its part."""
        distributed.barrier()
        if distributed.is_main():
            if self.best_weights is not None:
                adapter.save_weights(self.best_weights, folder / ADAPTER_FOLDER, folder / BEST_FOLDER)
            checkpoints.write_marker(folder, step)
        distributed.barrier()

    def _has_stopped_improving(self) -> bool:
        return history.has_stopped_improving(self.state.log_history, self.config.early_stopping_patience)

    # The methods below override methods of the Trainer; `_divergence_error` is their helper.

    def _evaluate(self, trial: Any = None, ignore_keys_for_eval: Any = None, skip_scheduler: bool = False) -> Any:
        """Measure the evaluation loss; keep the best weights, stop early, or end a run that gets worse and worse."""
        self.control.should_evaluate = False
        try:
            loss = mean_loss(self.model, self.eval_dataset, self.pad_token_id, eval_batch_size(self.config))
        except TryAgain:  # the optimizer step is complete: save it, and evaluate when the run is resumed
            self.training_control.stop_reason = "asked to stop"
            self.control.should_training_stop = self.control.should_save = True
            return {}
        finally:
            self.model.train()
        assert loss is not None

        earlier_losses = [eval_loss for _, eval_loss in history.eval_losses(self.state.log_history)]
        self.log({"eval_loss": loss, "time": time.time()})
        if not earlier_losses or loss < min(earlier_losses):
            self.best_weights = adapter.copy_weights(self.model)
            self.control.should_save = True  # even if the run fails later, this adapter can be used

        if reason := divergence.hopeless_eval_loss(earlier_losses, loss, self.config):
            raise self._divergence_error(self.state.global_step, reason, name_rows=True)
        if self._has_stopped_improving():
            times = f"{self.config.early_stopping_patience} evaluations"
            progress.say(f"step {self.state.global_step}: the loss has not improved for {times}, so training ends")
            self.control.should_training_stop = self.control.should_save = True
        return {"eval_loss": loss}

    def get_train_dataloader(self) -> Any:
        """Return a loader of this process's rows in each step; accelerate would repeat rows where they are too few."""
        loader = DataLoader(
            self.train_dataset, batch_sampler=self.batch_sampler, collate_fn=self.data_collator,
            pin_memory=self.config.device == "cuda",
        )  # fmt: skip
        loader.set_epoch = self.batch_sampler.set_epoch
        return loader

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        # A row index below 0 marks a filler row, whose tokens are not counted.
        tokens = sum(int(batch["attention_mask"][batch["row_indices"] >= 0].sum()) for batch in batch_samples)
        supervised = sum(int(supervised_mask(batch).sum()) for batch in batch_samples)
        tokens, supervised = map(round, distributed.all_reduce_sum(tokens, supervised))
        self.step_tokens = {"tokens": tokens, "supervised_tokens": supervised}
        self.step_row_indices = [row for batch in batch_samples for row in batch.pop("row_indices").tolist()]
        return torch.tensor(supervised, device=device)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the micro-batch's part of the mean loss of the whole optimizer step, times the number of processes.

        DDP averages the gradients over the processes, and this factor turns the average into the sum.
        """
        assert num_items_in_batch is not None
        if model is not self.model:
            model = distributed.ForwardThroughDDP(model, self.model)
        return summed_loss(model, inputs) * distributed.world_size() / num_items_in_batch

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward over all rows of an optimizer step, in as few micro-batches as fit."""
        is_packed = packing.can_pack(self.model)
        own_count = packing.num_micro_batches(inputs, self.config.micro_batch_size, is_packed=is_packed)
        # With FSDP every rank must run the same number of micro-batches: each forward gathers shards from all ranks.
        count = max(distributed.all_gather(own_count))
        losses = []
        with packing.packed_attention(self.model):  # also around backward, which recomputes checkpointed layers
            for i, micro_batch in enumerate(packing.split_batch(inputs, count)):
                # DDP reduces the gradients over the processes once, in the last backward pass.
                with nullcontext() if i == count - 1 or model is self.model else model.no_sync():
                    losses.append(super().training_step(model, micro_batch, num_items_in_batch))
        self.step_loss = torch.stack(losses).sum()
        return self.step_loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """Return 0: nobody needs the count, and the Trainer would visit every parameter for each batch."""
        return 0

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        # Checked once per step, since the CPU waits for the GPU here. A NaN must not reach the optimizer.
        own_values = torch.stack([self.step_loss, norm.detach().to(self.args.device)]).tolist()
        for label, value in zip(("loss", "gradient norm"), distributed.all_reduce_sum(*own_values), strict=True):
            value /= distributed.world_size()  # noqa: PLW2901
            if not math.isfinite(value):
                raise self._divergence_error(self.state.global_step + 1, f"the {label} is {value}", name_rows=True)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's tokens, speed and memory to the log, and end a run whose loss is hopeless."""
        if "loss" in logs:
            logs = {**logs, **self.step_tokens, **self.training_control.step_metrics(self.step_tokens["tokens"])}
        super().log(logs, start_time)

        vocab_size = self.model.config.get_text_config().vocab_size
        if reason := divergence.hopeless_training_loss(self.state.log_history, vocab_size):
            raise self._divergence_error(self.state.global_step, reason)

    def _divergence_error(self, step: int, reason: str, *, name_rows: bool = False) -> Diverged:
        row_indices = [row for rows in distributed.all_gather(self.step_row_indices) for row in rows if row >= 0]
        last_good = "there is no checkpoint yet"
        if folders := checkpoints.sorted_checkpoints(self.scratch):
            last_good = f"the last good checkpoint is {folders[-1].name}{self._best_adapter_clause()}"
        rows = f"; its rows are {', '.join(self.train_dataset.row_ids[i] for i in row_indices)}" if name_rows else ""
        return Diverged(
            f"step {step} of {self.training_control.total_steps}: {reason}; {last_good}{rows}. "
            "Lower train.learning_rate or train.max_grad_norm, or check the training rows"
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = self.scratch / f"checkpoint-{step}"
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
        distributed.barrier()
        try:
            super()._save_checkpoint(model, trial)
            self._finalize_checkpoint(folder, step)
        except Exception as error:
            # safetensors mentions a full disk only in the text of its own error, and torch does not mention it at all.
            is_disk_full = os.strerror(ENOSPC) in str(error) or shutil.disk_usage(self.scratch).free < MIN_FREE_BYTES
            shutil.rmtree(folder, ignore_errors=True)
            if is_disk_full:
                message = f"step {step}: no space for a checkpoint in scratch; free some space and run the step again"
                raise TryAgain(message, cause=Cause.DISK_FULL) from error
            raise

        if distributed.is_main():
            for old_folder in checkpoints.sorted_checkpoints(self.scratch)[:-MAX_CHECKPOINTS]:
                shutil.rmtree(old_folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        # The Trainer calls this in every process. Only the adapter is saved: no model card, no pickled arguments.
        if distributed.is_main():
            adapter.save(self.model, Path(output_dir) / ADAPTER_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        adapter.set_weights(self.model, adapter.load_weights(folder / ADAPTER_FOLDER))
        self.best_weights = adapter.load_weights(folder / BEST_FOLDER) if (folder / BEST_FOLDER).is_dir() else None
