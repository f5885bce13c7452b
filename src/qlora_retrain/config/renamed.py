"""Knobs that have a new name: old name -> new name, so that an old YAML is refused with the name to write instead.

The YAML reader and Airflow's form both use this table. An old name is never accepted: it would be a second name for
one setting in every plan, report and key. Delete an entry once no line in use can still hold the old name.
"""

from __future__ import annotations

RENAMED_KNOBS = {
    "data.max_drift": "data.max_drift_psi",
    "data.max_duplicates": "data.max_duplicates_fraction",
    "data.max_quarantined": "data.max_quarantined_fraction",
    "data.min_eval_rows": "data.min_eval_prompts",
    "data.min_golden_rows": "data.min_golden_prompts",
    "data.reference": "data.reference_version",
    "data.salt": "data.split_seed",
    "quantize.dtype": "quantize.compute_dtype",
    "quantize.quant_type": "quantize.format",
    "train.batch_size": "train.micro_batch_size",
    "train.early_stopping": "train.early_stopping_patience",
    "train.evaluations": "train.num_evals",
    "train.gradient_accumulation": "train.global_batch_size",
    "train.rslora": "train.method",
    "train.processes": "train.num_processes",
    "train.warmup": "train.warmup_ratio",
    "train.worse_factor": "train.divergence_factor",
    "train.worse_times": "train.divergence_patience",
    "evaluate.first_release": "evaluate.allow_first_release",
    "evaluate.intruder_top": "evaluate.intruder_top_k",
    "evaluate.labels_by": "evaluate.label_scoring",
    "evaluate.max_drift": "evaluate.max_drift_psi",
    "evaluate.max_slice_loss": "evaluate.max_slice_regression",
    "evaluate.max_train_eval_gap": "evaluate.max_train_eval_gap_nats",
    "evaluate.min_golden_rows": "evaluate.min_golden_prompts",
    "evaluate.min_rows": "evaluate.min_prompts",
    "evaluate.min_slice_rows": "evaluate.min_slice_prompts",
    "evaluate.primary": "evaluate.primary_metric",
    "merge.max_export_loss_nats": "merge.max_export_loss_increase_nats",
    "merge.max_loss_nats": "merge.max_loss_increase_nats",
    "merge.min_rows": "merge.min_prompts",
    "work_gib": "disk_gib",  # of a cluster's profile
}
# What else changed, where the old value does not simply move to the new name.
_COUNTS_PROMPTS = "it counts different prompts, and no longer rows"
_NOTES = {
    "data.min_eval_rows": _COUNTS_PROMPTS,
    "data.min_golden_rows": _COUNTS_PROMPTS,
    "evaluate.min_golden_rows": _COUNTS_PROMPTS,
    "evaluate.min_rows": _COUNTS_PROMPTS,
    "evaluate.min_slice_rows": _COUNTS_PROMPTS,
    "merge.min_rows": _COUNTS_PROMPTS,
    "train.batch_size": "set train.global_batch_size too, to micro_batch_size * the old gradient_accumulation",
    "train.rslora": "true is rslora, false is lora",
    "train.gradient_accumulation": "set it to micro_batch_size * the old gradient_accumulation",
}


def renamed_to(path: str) -> str | None:
    """Return a sentence that names the knob's new name; None where the knob was never renamed."""
    # A section that lines had once. Of platform.yaml, which has it now, this is asked about its fields alone.
    if path == "runtime":
        return f"{path} is the platform's to say: its owner sets it in platform.yaml (docs/platform.md)"
    if path not in RENAMED_KNOBS:
        return None
    note = f"; {_NOTES[path]}" if path in _NOTES else ""
    return f"{path} is now {RENAMED_KNOBS[path]}{note}"
