"""Versions with reports, a recipe and verdicts, published without any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_retrain.core import hashing
from qlora_retrain.storage import registry
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store


def publish_version(
    store: Store, folder: Path, number: int, *, line: str = "intents", accuracy: float = 0.8, **documents: Any
) -> Release:
    """Publish a version; return its manifest.

    Args:
        store: The store.
        folder: A folder for the files before they are uploaded.
        number: From 1 to 31, the day of its creation; a larger number is a newer version.
        line: The line.
        accuracy: What the evaluation is to have measured.
        documents: Further JSON documents, by path.
    """
    content = hashing.sha256_json([line, number])
    stamp = f"202601{number:02d}T120000Z"
    values = {"accuracy": accuracy, "accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.05, "rows": 90}
    texts = {
        "evaluation/evaluation.json": {
            "verdict": "pass",
            "sentence": f"passed 8 rules: accuracy {accuracy}",
            "metric": "accuracy",
            "contestants": {"challenger": values, "champion": {**values, "accuracy": accuracy - 0.02}},
        },
        "evaluation/certificate.json": {"verdict": "pass", "sentence": "passed 10 rules"},
        "recipe.json": {
            "steps": {"train_qlora": {"rank": number, "seed": 0}},
            "code": {"train_qlora": "same"},
            "sources": {"raw_data": {"tickets.jsonl": f"sha256:{str(number) * 64}"}, "golden_data": None},
            "champion": None,
        },
        **documents,
    }
    files = {path: json.dumps(document) for path, document in texts.items()}
    files |= {f"reports/{report}.html": f"<p>{report} of {number}</p>" for report in ("data", "evaluation")}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)

    version = f"{stamp}-{content[:12]}"
    store.upload(folder, registry.version_folder(line, version), files)
    release = Release(
        line=line, version=version, content_hash=content, created_at=stamp,
        files=tuple(
            File(path=path, size_bytes=len(text.encode()), sha256=hashing.sha256_bytes(text.encode()))
            for path, text in files.items()
        ),
        adapter_key="a", judgement="j", keys={}, base={"files": {"model.safetensors": "sha256:b"}},
        numbers={"dataset": {"rows_train": 100 * number, "seconds": 3.0}}, provenance={"run_id": "r"},
    )  # fmt: skip
    return registry.complete_version(store, release)
