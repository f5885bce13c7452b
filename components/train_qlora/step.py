"""Train a LoRA adapter over the frozen base, on the answers' tokens only.

Reads dataset (`train.jsonl`, `replay.jsonl`, `eval.jsonl`), base_nf4 (the base in 4 or 16 bits, with its tokenizer)
and, with `train.start: champion`, champion_adapter, the adapter of the version in production.
Makes adapter: PEFT's two files, `training.json`, `loss.jsonl` (a line per step), `report.html` and TensorBoard's file.
Saves checkpoints to scratch and resumes from the newest one that verifies and fits this run.
Refuses (12) data with nothing to learn, unknown layers and a model that does not compute each row alone, and (13)
unsafe or damaged inputs.
Ends with 14 when training diverges, and with 75 after saving when it was stopped or its time budget is used up.

Command: `python -m components.train_qlora --plan URI`
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

from components.train_qlora import history
from components.train_qlora.batching import process_micro_batch_size
from components.train_qlora.processes.launch import launch
from components.train_qlora.processes.oom_retry import retry_with_smaller_micro_batches
from components.train_qlora.report import report_page, write_event_file
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import json_lines, progress
from qlora_retrain.core.outcome import Number, StepResult

# The reported training loss is the mean over the last 10 steps, since that of a single one is noisy.
LAST_STEPS = 10


def run(
    config: TrainConfig,
    dataset: Path,
    base_nf4: Path,
    adapter: Path,
    *,
    scratch: Path,
    champion_adapter: Path | None = None,
) -> StepResult:
    """Train, measure the evaluation loss, and write the adapter with its logs and its report.

    Raises:
        UsageError: If there is nothing to learn, or the settings do not fit the model or the machine.
        IntegrityError: If an input is unsafe or damaged.
        Diverged: If a loss or a gradient is not finite, or the loss is hopeless.
        TryAgain: If stopped before the end, after saving a checkpoint, or if a training process was killed.
        MemoryError: If memory runs out with micro-batches of a single row.
    """
    if champion_adapter:
        progress.say("training goes on from the adapter in production (train.start: champion)")
    history.begin_attempt(scratch)
    result, final_config, oom_messages = retry_with_smaller_micro_batches(
        config, scratch, lambda reduced: launch(reduced, dataset, base_nf4, adapter, scratch, champion_adapter)
    )

    # The GPU's peak is reported only where a GPU was used. The host's peak is that of the workers and of this process.
    log = result.log
    steps, eval_losses = history.steps(log), history.eval_losses(log)
    last_losses = [entry["loss"] for entry in steps[-LAST_STEPS:]]
    resumed_at = history.first_step(scratch)
    if resumed_at == len(steps):
        progress.say(
            f"no step was trained: the adapter, and every loss but the evaluation's, are checkpoint-{resumed_at}'s"
        )
    numbers: dict[str, Number] = {
        "steps": len(steps),
        "start": "champion" if champion_adapter else "base",
        # What an earlier attempt trained is taken from its checkpoint, and was not seen by this one.
        "resumed_at": resumed_at,
        "trained_steps": len(steps) - resumed_at,
        "train_loss": sum(last_losses) / len(last_losses),
        "eval_loss": result.eval_loss,
        "best_step": history.best_step(log),
        "tokens": sum(entry["tokens"] for entry in steps),
        "supervised_tokens": sum(entry["supervised_tokens"] for entry in steps),
        "tokens_per_second": result.tokens_per_second,
        "peak_rss_mib": result.peak_rss_mib + round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_gpu_mib": history.peak_memory_mib(log) if config.device == "cuda" else None,
        "trainable_parameters": sum(size for _, _, size in result.layers),
        "num_processes": config.num_processes,
        "micro_batch_size": process_micro_batch_size(final_config),
        "out_of_memory": len(oom_messages),
        "optimizer": result.optimizer,
    }

    # `training.json` has the out-of-memory messages, the numbers have only their count.
    settings, counts = config.model_dump(mode="json"), (result.train_rows, result.eval_rows)
    document: dict[str, Any] = {"settings": settings, "train_rows": counts[0], "eval_rows": counts[1], **numbers}
    document |= {"evaluation_losses": eval_losses, "out_of_memory": oom_messages}
    document |= {"ranks": result.ranks} if result.ranks else {}
    (adapter / "training.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    json_lines.write(adapter / "loss.jsonl", steps)
    write_event_file(adapter, history.curves(log))

    page = report_page(
        config, numbers, steps, eval_losses, history.timings(log), result.layers, result.ranks, oom_messages
    )
    (adapter / "report.html").write_text(page, encoding="utf-8")
    return StepResult(numbers)
