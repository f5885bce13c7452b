"""transformers' Trainer, with our loss, our order, our checkpoints and our ways to stop."""

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
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from components.train_qlora import history, lora, packed, ranks
from components.train_qlora.loss import mean_loss, summed_loss, supervised
from components.train_qlora.preflight import overfit
from components.train_qlora.rows import Batch, Collate, Order, Rows, Steps
from components.train_qlora.watch import USED_UP, Watch
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress, signals
from qlora_retrain.core.errors import Diverged, TryAgain
from qlora_retrain.lm import checkpoints

KEPT_CHECKPOINTS = 2
FULL_BYTES = 2**20  # a save that failed with less space than this left has failed for it
ADAPTER = "adapter"  # in a checkpoint: a folder that can be attached as it is
BEST = "best"  # in a checkpoint: likewise, of the lowest evaluation loss so far
HOPELESS_STEPS = 20  # a mean loss over this many steps ...
HOPELESS = 1.5  # ... that is this many times worse than guessing, and worse than the first step's
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def total_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps in all."""
    return config.max_steps or math.ceil(config.epochs * math.ceil(rows / config.rows_a_step))


def arguments(config: TrainConfig, steps: int, scratch: Path) -> TrainingArguments:
    """Our settings in the Trainer's words; it is given whole optimizer steps, which `training_step` cuts."""
    return TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=config.rows_a_step,
        max_steps=steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULES[config.schedule],
        warmup_steps=config.warmup,  # below 1: a share of the steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer,
        seed=config.seed,
        use_cpu=config.device != "cuda",
        bf16=False,  # the base computes in bf16 by itself; autocast would only add casts
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a NaN behind a running mean
        save_strategy="no",  # `Watch` decides by time
        eval_strategy="no",
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every pass reaches every adapter
    )


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Trains the adapter of a `PeftModel` on encoded rows; one device a process, alone or with others (`ranks`)."""

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the supervised tokens of the whole optimizer step

    def __init__(
        self, model: PeftModel, config: TrainConfig, rows: Rows, held_out: Rows, pad: int, scratch: Path
    ) -> None:
        self.config, self.held_out, self.pad, self.scratch = config, held_out, pad, scratch
        self.watch = Watch(config, total_steps(config, len(rows)))
        self.order = Order(rows.lengths, config.rows_a_step, config.seed)
        self.steps = Steps(self.order, ranks.number(), ranks.count())
        args = arguments(config, self.watch.steps, scratch)
        args._n_gpu = min(args.n_gpu, 1)  # a step gets one GPU; DataParallel does not know 4-bit weights
        # DDP has the adapter alone to look after: all processes read the same frozen base.
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        model._ddp_params_and_buffers_to_ignore = frozen + [name for name, _ in model.named_buffers()]
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=Collate(pad), callbacks=[self.watch])
        self.remove_callback(PrinterCallback)
        self.counts: dict[str, int] = {}
        self.step_rows: list[int] = []  # of the optimizer step that is being computed
        self.step_loss = torch.zeros(())
        self.best: dict[str, torch.Tensor] | None = None  # weights of the lowest evaluation loss

    def train_or_go_on(self) -> None:
        """Train to the last step, from the newest valid checkpoint if there is one.

        Raises:
            Diverged: If a loss or a gradient is not finite, or the loss is hopeless.
            TryAgain: If asked to stop, after saving.
        """
        newest = ranks.from_first(self._newest)
        begin = checkpoints.step_of(newest) if newest else 0
        if newest:
            progress.say(f"going on from {newest.name} of {self.watch.steps} steps")
            self._load_from_checkpoint(str(newest))
            self.state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
            self._measure_what_was_cut_off(newest, begin)
        if not newest or not (begin >= self.watch.steps or self._no_better()):
            if signals.requested():
                raise TryAgain("asked to stop before the first step; run it again")
            if not newest:
                overfit(self.model, self.config, self.train_dataset, self.pad, self.watch.steps)
            if self.watch.used_up(history.seconds(self.state.log_history)):  # a retry buys no time
                self.watch.stopped = USED_UP
            else:
                self.train(resume_from_checkpoint=str(newest) if newest else None)
            if self.watch.stopped:
                raise TryAgain(
                    f"step {self.state.global_step} of {self.watch.steps}, saved as "
                    f"checkpoint-{self.state.global_step}: {self.watch.stopped}. "
                    f"Its {ADAPTER}/ can be used as it is{self._with_the_best()}"
                )
        if self.best is not None:
            lora.put(self.model, self.best)

    def _with_the_best(self) -> str:
        best = history.best_step(self.state.log_history)
        return f"; its {BEST}/ is the adapter of step {best}, the best measured" if best is not None else ""

    def _newest(self) -> Path | None:
        newest = checkpoints.newest_valid(self.scratch)
        for folder in checkpoints.found(self.scratch):
            if newest is None or checkpoints.step_of(folder) > checkpoints.step_of(newest):
                shutil.rmtree(folder)  # it did not verify, and will be made again
        return newest

    def _measure_what_was_cut_off(self, newest: Path, step: int) -> None:
        """A run that was asked to stop while it measured had saved the step without the measurement."""
        if step in self.watch.measure_at and step not in dict(history.evaluations(self.state.log_history)):
            self._evaluate()
            if self.watch.stopped:
                raise TryAgain(f"step {step} of {self.watch.steps}, saved before: {self.watch.stopped}")
            if ranks.first():
                self.state.save_to_json(str(newest / "trainer_state.json"))
            self._seal(newest, step)

    def _seal(self, folder: Path, step: int) -> None:
        """Complete a checkpoint to which every process has written its part."""
        ranks.together()
        if ranks.first():
            if self.best is not None:
                lora.save_other(self.best, folder / ADAPTER, folder / BEST)
            checkpoints.complete(folder, step)
        ranks.together()

    def _no_better(self) -> bool:
        return history.no_better(self.state.log_history, self.config.early_stopping)

    # What follows replaces single methods of the Trainer.

    def _evaluate(self, trial: Any = None, ignore_keys_for_eval: Any = None, skip_scheduler: bool = False) -> Any:
        """Measure the evaluation loss; keep the best weights, end early, or end a run that gets worse and worse."""
        self.control.should_evaluate = False
        try:
            loss = mean_loss(self.model, self.held_out, self.pad, 2 * self.config.batch_size)
        except TryAgain:  # the step itself is done: save it, and measure when the run goes on
            self.watch.stopped = "asked to stop"
            self.control.should_training_stop = self.control.should_save = True
            return {}
        finally:
            self.model.train()
        assert loss is not None
        before = [found for _, found in history.evaluations(self.state.log_history)]
        self.log({"eval_loss": loss, "time": time.time()})
        if not before or loss < min(before):
            self.best = lora.weights(self.model)
            self.control.should_save = True  # whatever becomes of the run, it is there to be used
        recent = [*before, loss][-self.config.worse_times :]
        limit = self.config.worse_factor * min(before, default=math.inf)
        if not math.isfinite(loss) or (len(recent) == self.config.worse_times and min(recent) > limit):
            what = f"the evaluation loss is {loss:.3f}, {len(recent)} times in a row above {limit:.3f}"
            raise self._diverged(self.state.global_step, what, batch=True)
        if self._no_better():
            progress.say(
                f"step {self.state.global_step}: no better for {self.config.early_stopping} measurements: done"
            )
            self.control.should_training_stop = self.control.should_save = True
        return {"eval_loss": loss}

    def get_train_dataloader(self) -> Any:
        """This process's rows of each step; accelerate would repeat some where they are too few."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.steps,
            collate_fn=self.data_collator,
            pin_memory=self.config.device == "cuda",
        )
        loader.set_epoch = self.steps.set_epoch
        return loader

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        tokens = sum(int(batch["attention_mask"][batch["rows"] >= 0].sum()) for batch in batch_samples)
        items = sum(int(supervised(batch).sum()) for batch in batch_samples)
        tokens, items = map(round, ranks.summed(tokens, items))
        self.counts = {"tokens": tokens, "supervised_tokens": items}
        self.step_rows = [row for batch in batch_samples for row in batch.pop("rows").tolist()]
        return torch.tensor(items, device=device)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """This forward pass's part of the mean over the whole optimizer step.

        Times the number of processes, since DDP takes the mean of their gradients.
        """
        assert num_items_in_batch is not None
        if model is not self.model:
            model = ranks.Wrapped(model, self.model)
        return summed_loss(model, inputs) * ranks.count() / num_items_in_batch

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over all rows of an optimizer step, in as few passes as `batch_size` allows."""
        here = packed.passes(inputs, self.config.batch_size, packs=packed.can_pack(self.model))
        count = max(ranks.gathered(here))  # where each holds a part of the base, all go through it equally often
        losses = []
        with packed.attention_by_rows(self.model):  # a layer that is computed twice is so in the backward pass
            for left, part in zip(reversed(range(count)), packed.cut(inputs, count), strict=True):
                with model.no_sync() if left and model is not self.model else nullcontext():
                    losses.append(super().training_step(model, part, num_items_in_batch))
        self.step_loss = torch.stack(losses).sum()
        return self.step_loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """Nobody asked: the Trainer would count every parameter of the model for each batch."""
        return 0

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        # Once a step, since a GPU has to wait for it, and before the optimizer spoils the weights with it.
        here = torch.stack([self.step_loss, norm.detach().to(self.args.device)]).tolist()
        for what, value in zip(("loss", "gradient norm"), ranks.summed(*here), strict=True):
            value /= ranks.count()  # noqa: PLW2901
            if not math.isfinite(value):
                raise self._diverged(self.state.global_step + 1, f"the {what} is {value}", batch=True)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the step consumed, and end a run that cannot be saved."""
        if "loss" in logs:
            logs = {**logs, **self.counts, **self.watch.measured(self.counts["tokens"])}
        super().log(logs, start_time)
        last = [e["loss"] for e in self.state.log_history[-2 * HOPELESS_STEPS :] if "loss" in e][-HOPELESS_STEPS:]
        first = next((entry["loss"] for entry in self.state.log_history if "loss" in entry), 0.0)
        recent = sum(last) / HOPELESS_STEPS
        limit = max(HOPELESS * math.log(self.model.config.get_text_config().vocab_size), first)
        if len(last) >= HOPELESS_STEPS and recent > limit:
            what = f"the mean loss of the last {HOPELESS_STEPS} steps is {recent:.1f}, worse than guessing"
            raise self._diverged(self.state.global_step, what)

    def _diverged(self, step: int, what: str, *, batch: bool = False) -> Diverged:
        step_rows = [row for rows in ranks.gathered(self.step_rows) for row in rows if row >= 0]
        good = checkpoints.found(self.scratch)
        last = (
            f"the last good checkpoint is {good[-1].name}{self._with_the_best()}"
            if good
            else "there is no checkpoint yet"
        )
        rows = f"; its rows are {', '.join(self.train_dataset.ids[i] for i in step_rows)}" if batch else ""
        return Diverged(
            f"step {step} of {self.watch.steps}: {what}; {last}{rows}. "
            "Lower train.learning_rate or train.max_grad_norm, or look at the rows"
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        folder = self.scratch / f"checkpoint-{step}"
        if ranks.first():
            shutil.rmtree(folder, ignore_errors=True)
        ranks.together()
        try:
            super()._save_checkpoint(model, trial)
            self._seal(folder, step)
        except Exception as error:
            # safetensors says it in the text of an error of its own, and torch does not say it at all.
            full = os.strerror(ENOSPC) in str(error) or shutil.disk_usage(self.scratch).free < FULL_BYTES
            shutil.rmtree(folder, ignore_errors=True)
            if full:
                raise TryAgain(
                    f"step {step}: no space for a checkpoint in scratch; free some and run it again"
                ) from error
            raise
        for old in checkpoints.found(self.scratch)[:-KEPT_CHECKPOINTS] if ranks.first() else ():
            shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        if ranks.first():  # the Trainer leaves it to each process
            lora.save(self.model, Path(output_dir) / ADAPTER)  # the adapter alone: no model card, no pickled arguments

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        lora.put(self.model, lora.load(folder / ADAPTER))
        self.best = lora.load(folder / BEST) if (folder / BEST).is_dir() else None
