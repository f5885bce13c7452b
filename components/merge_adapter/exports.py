"""The further forms in which the merged model ships: 4-bit for bitsandbytes, GGUF for llama.cpp.

Each lies below `model/exports/` and is scored as it stands on disk: the 4-bit form as transformers loads it, a GGUF
file with its weights unpacked into a transformers model. llama.cpp is not asked: what a certificate says must not
depend on whether it is installed.

GGUF is made from the merged model that ships. The 4-bit form is made from the adapter merged into the original base,
whichever base ships: a dequantized weight lies on a level of the 4-bit code, so quantizing it again after a small
change brings it back to that level, and what was trained is gone.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.merge_adapter.candidates import Bench, Measured
from components.merge_adapter.merge import copy_tokenizer, merge
from qlora_retrain.config.sections import MergeConfig
from qlora_retrain.core import progress
from qlora_retrain.lm import loading

FOLDER = "exports"


@dataclass(frozen=True, slots=True)
class Export:
    """A form that ships.

    Attributes:
        path: Below `model/`: a folder, or a GGUF file.
        size_bytes: Of its weights.
        measured: On the rows that certify.
    """

    path: str
    size_bytes: int
    measured: Measured


def check(config: MergeConfig, base_model: Path) -> None:
    """Raise `UsageError` for an export that cannot be made of this base, before anything is built."""
    if any(name.startswith("gguf") for name in config.exports):
        from components.merge_adapter import gguf_file

        gguf_file.check(base_model)


def make(
    config: MergeConfig, bench: Bench, base_model: Path, base_nf4: Path, adapter: Path, model: Path
) -> dict[str, Export]:
    """Make and measure every export but bf16, one in memory at a time beside the live model."""
    found: dict[str, Export] = {}
    rows = [row for row in bench.rows if row.id in bench.compared]
    for name in (name for name in config.exports if name != "bf16"):
        folder = model / FOLDER / name
        folder.mkdir(parents=True)
        if name == "nf4":
            path = folder
            with TemporaryDirectory(dir=model.parent) as merged:
                source = Path(merged)
                merge(base_model, base_nf4, adapter, source, dequantized=False, max_shard_gib=config.max_shard_gib)
                _quantize(source, base_nf4, folder, config.max_shard_gib)
            loaded: Any = loading.load_nf4(folder, **bench.where)
        else:
            from components.merge_adapter import gguf_file

            path = folder / f"model-{name.removeprefix('gguf-')}.gguf"
            gguf_file.write(model, path, name)
            loaded = loading.load_gguf(path, **bench.where)
        size = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf"))
        progress.say(f"{name}: {size / 2**30:.2f} GiB")
        found[name] = Export(path.relative_to(model).as_posix(), size, bench.measure(name, loaded, model, rows))
        del loaded
        gc.collect()
    return found


def _quantize(merged: Path, base_nf4: Path, folder: Path, max_shard_gib: float) -> None:
    """Quantize as the base was for training: the same type, scales, and layers left alone."""
    from transformers import BitsAndBytesConfig

    settings: Mapping[str, Any] = json.loads((base_nf4 / "config.json").read_text(encoding="utf-8"))
    quantization = BitsAndBytesConfig.from_dict(settings["quantization_config"])
    loaded = loading.load_base(merged, dtype="bfloat16", quantization=quantization)
    loaded.config._name_or_path = ""  # a path of this machine must not enter the artifact
    loaded.save_pretrained(folder, max_shard_size=f"{max_shard_gib * 1024**3 / 1e6:.0f}MB")
    copy_tokenizer(merged, folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which another user's consumer could not read
