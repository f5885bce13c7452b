"""Train a LoRA adapter over the frozen 4-bit base, on the answers' tokens only.

Reads dataset (`train.jsonl`, `eval.jsonl`) and base_nf4 (a pre-quantized model with its tokenizer).
Makes adapter: PEFT's two files, `training.json`, `loss.jsonl` (a line a step) and `report.html`.
Keeps checkpoints in scratch and goes on from the newest one that verifies.
Refuses (12) data with nothing to learn and unknown layers; (13) unsafe or damaged inputs; ends with (14) when training
diverges and with (75) when it was stopped or its time budget is used up, after saving.

Command: `python -m components.train_qlora --plan URI`
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

from components.train_qlora import events, history
from components.train_qlora.processes import train_apart
from components.train_qlora.result import report_page
from components.train_qlora.shrinking import shrinking
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.outcome import Number, Report

LAST_STEPS = 10  # the training loss that is reported is their mean


def run(config: TrainConfig, dataset: Path, base_nf4: Path, adapter: Path, *, scratch: Path) -> Report:
    """Train, measure the evaluation loss, and write the adapter with its papers.

    Raises:
        UsageError: If there is nothing to learn, or the settings do not fit the model or the machine.
        IntegrityError: If an input is unsafe or damaged.
        Diverged: If a loss or a gradient is not finite, or the loss is hopeless.
        TryAgain: If stopped before the end, after saving a checkpoint, or a process that trains was killed.
        MemoryError: If memory runs out with a single row a pass.
    """
    trained, used, halvings = shrinking(
        config, scratch, lambda now: train_apart(now, dataset, base_nf4, adapter, scratch)
    )
    log = trained.log
    steps, evaluations = history.steps(log), history.evaluations(log)
    last = [entry["loss"] for entry in steps[-LAST_STEPS:]]
    numbers: dict[str, Number] = {
        "steps": len(steps),
        "train_loss": sum(last) / len(last),
        "eval_loss": trained.eval_loss,
        "best_step": history.best_step(log),
        "tokens": sum(entry["tokens"] for entry in steps),
        "supervised_tokens": sum(entry["supervised_tokens"] for entry in steps),
        "tokens_per_second": trained.tokens_per_second,
        "peak_rss_mib": trained.peak_rss_mib + round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_gpu_mib": history.peak_mib(log) if config.device == "cuda" else None,
        "trainable_parameters": sum(size for _, _, size in trained.layers),
        "processes": config.processes,
        "rows_a_pass": used.rows_a_pass,
        "out_of_memory": len(halvings),
        "optimizer": trained.optimizer,
    }
    settings, counts = config.model_dump(mode="json"), (trained.train_rows, trained.eval_rows)
    document: dict[str, Any] = {"settings": settings, "train_rows": counts[0], "eval_rows": counts[1], **numbers}
    document |= {"evaluation_losses": evaluations, "out_of_memory": halvings}
    (adapter / "training.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (adapter / "loss.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in steps), encoding="utf-8")
    events.write(adapter, history.curves(log))
    page = report_page(config, numbers, steps, evaluations, history.timings(log), trained.layers, halvings)
    (adapter / "report.html").write_text(page, encoding="utf-8")
    return Report(numbers)
