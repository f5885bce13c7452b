"""Score an adapter that one training made for every rank (DyLoRA), cut to its first ranks, on the rows that judge."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RANKS = (2, 4, 8)


def cut_results(store: Path, result: dict[str, Any], done: set[str]) -> Iterator[dict[str, Any]]:
    """Yield what the adapter of a result measures with fewer ranks, one result for each rank that is not done.

    Args:
        store: The folder of the store.
        result: What `methods.py` measured of the whole adapter.
        done: The names of the results that are there already.
    """
    from components.merge_adapter import adapter_forms
    from qlora_retrain.evaluation import scoring
    from qlora_retrain.lm import chat, loading
    from qlora_retrain.pipeline import status
    from qlora_retrain.pipeline.plan import Plan

    plan = Plan.of_run(store.resolve().as_uri(), result["numbers"]["run"])
    steps = ("validate_data", "quantize_model", "train_qlora")
    dataset, base, adapter = (store / status.find_manifest(plan, step).prefix for step in steps)
    rows = scoring.read_rows(dataset / "eval.jsonl", "eval")
    labels = json.loads((dataset / "dataset.json").read_text())["labels"]
    for rank in RANKS:
        name = f"{result['name']}, first {rank}"
        if name in done:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "adapter"
            adapter_forms.cut(adapter, folder, rank)
            size = (folder / "adapter_model.safetensors").stat().st_size
            model = loading.attach_adapter(loading.load_nf4(base, dtype="float32", attn_implementation="eager"), folder)
            scores = scoring.score_rows(
                model, chat.load_tokenizer(base), rows, labels=labels, batch_tokens=4096, description=name
            )
        numbers = {**result["numbers"], "adapter_bytes": size, "merge_loss_nats": None, "forgetting_nats": None}
        yield {
            **result,
            "name": name,
            "numbers": numbers,
            "rows": {score.id: [score.correct, score.loss_nats, score.tokens, score.prompt] for score in scores},
        }
