"""Build and score the exports of the merged model: 4-bit for bitsandbytes, GGUF for llama.cpp, the adapter as GGUF.

Each export is in `model/exports/` and is scored as it is on disk: the 4-bit form as transformers loads it, a GGUF file
with its weights dequantized into a transformers model, a GGUF adapter over the original base. No model runs in
llama.cpp, since a certificate must not depend on whether it is installed.

GGUF is made from the merged model that ships. The exception is Q4_1 of an adapter of QA-LoRA over `int4`: then the base
has this form already, and the adapter only moves its minima. The 4-bit form for bitsandbytes is made from the adapter
merged into the original base, whichever base ships. A dequantized weight lies on a level of the 4-bit code. Quantizing
it again after a small change would round it back to that level, so the training would be lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.merge_adapter import moved_minima
from components.merge_adapter.form_scores import FormScorer, FormScores
from components.merge_adapter.merge import copy_tokenizer, merge
from qlora_retrain.config.merge import MergeConfig
from qlora_retrain.core import progress
from qlora_retrain.lm import base_formats, loading
from qlora_retrain.lm.base_formats import FourBits
from qlora_retrain.lm.loading import LoadOptions
from qlora_retrain.lm.streaming_quantizer import load_quantized

FOLDER = "exports"
ADAPTER = "gguf-lora"
DEFAULT_4_BITS = FourBits("nf4", double_quant=True, compute_dtype="bfloat16")


@dataclass(frozen=True, slots=True)
class Export:
    """A form that ships.

    Attributes:
        path: The path of a folder or a GGUF file, below `model/`.
        size_bytes: The size of its weights.
        scores: Its scores on the rows that certify.
        notes: What a user of the file must know of it; one sentence each.
    """

    path: str
    size_bytes: int
    scores: FormScores
    notes: tuple[str, ...] = ()


def refuse_unsupported(config: MergeConfig, base_model: Path) -> None:
    """Raise `UsageError` for an export that cannot be made of this base, before anything is built."""
    # Imported here, since a line without GGUF exports needs no gguf package.
    if any(name.startswith("gguf") for name in config.exports):
        from components.merge_adapter import gguf_file

        gguf_file.refuse_unsupported(base_model, [name for name in config.exports if name.startswith("gguf")])


def build_exports(
    config: MergeConfig,
    scorer: FormScorer,
    base_model: Path,
    base_nf4: Path,
    adapter: Path,
    model: Path,
    merged_model: Path,
) -> dict[str, Export]:
    """Build and score every export but bf16, one in memory at a time.

    Args:
        config: Which exports there are.
        scorer: Scores them.
        base_model: The original base.
        base_nf4: The base that was trained over.
        adapter: The adapter that was merged.
        model: The folder of the result.
        merged_model: The merged model: that folder too, unless the merged model does not ship.
    """
    exports: dict[str, Export] = {}
    # An export takes no part in the selection, so only the rows that certify are scored.
    compared_ids = set(scorer.unmerged_logits.row_ids)
    rows = [row for row in scorer.rows if row.id in compared_ids]

    # bf16 is the model folder itself, which was scored already.
    for name in (name for name in config.exports if name != "bf16"):
        folder = model / FOLDER / name
        folder.mkdir(parents=True)
        notes: list[str] = []
        if name == "nf4":
            path = folder
            # Beside the model folder, so that the 16-bit copy never becomes a part of the artifact.
            with TemporaryDirectory(dir=model.parent) as merged:
                source = Path(merged)
                merge(base_model, base_nf4, adapter, source, dequantized=False, max_shard_gib=config.max_shard_gib)
                _quantize(source, merged_model, base_nf4, folder, config.max_shard_gib)
            loaded: Any = loading.load_nf4(folder, **scorer.load_options)
        elif name == ADAPTER:
            path = folder / "adapter.gguf"
            loaded = _build_adapter(base_model, adapter, path, scorer.load_options)
        else:
            path = folder / f"model-{name.removeprefix('gguf-')}.gguf"
            loaded, notes = _build_gguf(name, base_model, base_nf4, adapter, merged_model, path, scorer.load_options)

        size_bytes = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf"))
        progress.say(f"{name}: {size_bytes / 2**30:.2f} GiB")
        exports[name] = Export(
            path.relative_to(model).as_posix(),
            size_bytes,
            scorer.score(name, loaded, merged_model, rows, measure_endings=True),
            tuple(notes),
        )
        del loaded  # before the next one is loaded
    return exports


def _build_gguf(
    name: str, base_model: Path, base_nf4: Path, adapter: Path, model: Path, path: Path, load_options: LoadOptions
) -> tuple[Any, list[str]]:
    """Write a GGUF file with its Modelfile; return the model that it holds, and what its user must know."""
    from components.merge_adapter import gguf_file, modelfile

    if name == "gguf-q4_1" and _moves_minima(base_nf4, adapter):
        progress.say(f"{name}: the codes of base_nf4 with the adapter in their minima; nothing is quantized")
        with moved_minima.open_blocks(base_model, base_nf4, adapter) as blocks:
            notes = gguf_file.write_gguf(model, path, name, blocks)
    else:
        notes = gguf_file.write_gguf(model, path, name)
    modelfile.write_modelfile(model, path)
    for note in notes:
        progress.say(f"{name}: {note}")
    return gguf_file.load_gguf(model, path, **load_options), notes


def _build_adapter(base_model: Path, adapter: Path, path: Path, load_options: LoadOptions) -> Any:
    """Write the adapter as a GGUF LoRA; return the base with it."""
    from components.merge_adapter import gguf_lora

    gguf_lora.write_gguf_lora(base_model, adapter, path)
    return gguf_lora.load_over_base(base_model, path, **load_options)


def _moves_minima(base_nf4: Path, adapter: Path) -> bool:
    return not loading.has_all_weights(adapter) and moved_minima.applies(base_nf4, adapter)


def _quantize(merged: Path, model: Path, base_nf4: Path, folder: Path, max_shard_gib: float) -> None:
    """Quantize with the settings of base_nf4: the same type, scales and excluded layers; one tensor at a time.

    Where the base of the training is not by bitsandbytes there are none, and the defaults of `quantize` are taken. This
    export is measured like any other, so what its 4 bits cost is known.
    """
    from transformers import BitsAndBytesConfig

    # Other settings would give other numbers than those that training saw.
    nf4_config: Mapping[str, Any] = json.loads((base_nf4 / "config.json").read_text(encoding="utf-8"))
    if isinstance(base_formats.from_folder(base_nf4), FourBits):
        quantization = BitsAndBytesConfig.from_dict(nf4_config["quantization_config"])
    else:
        quantization = DEFAULT_4_BITS.transformers_config()

    # On the CPU wherever the step runs: the same inputs give the same bytes.
    loaded = load_quantized(merged, quantization, folder, device="cpu", dtype="bfloat16")
    loaded.config._name_or_path = ""  # a path of this machine must not enter the artifact
    loaded.save_pretrained(folder, max_shard_size=f"{max_shard_gib * 1024**3 / 1e6:.0f}MB")
    # save_pretrained writes no tokenizer, and a generation config that names the base's end of an answer.
    copy_tokenizer(model, folder)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.chmod(0o644)  # safetensors writes 0600, which a consumer under another user could not read
