"""Write the adapter as a GGUF LoRA, which llama.cpp applies over a GGUF file of the base; and read it again.

Only plain LoRA has this form: two matrices for a layer, in the order of rows that GGUF has for the layer's weight.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from components.merge_adapter.gguf_layout import Layout
from components.merge_adapter.lora import LoraAdapter
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import loading
from qlora_retrain.lm.adapter_kind import LORA, adapter_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_gguf_lora(base_model: Path, adapter: Path, path: Path) -> None:
    """Write the file: the matrices in fp32, with the scale of training in B.

    Raises:
        UsageError: If the adapter is more than two matrices a layer, or the base has no name in GGUF.
    """
    if adapter_kind(adapter) != LORA:
        raise _no_lora("this one is no LoRA")
    layout = Layout.from_folder(base_model)
    writer = gguf.GGUFWriter(path, layout.family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")

    with LoraAdapter(adapter) as lora, contextlib.closing(writer):
        if any(lora.magnitudes(module) for module in lora.modules):
            raise _no_lora("this one has the magnitudes of DoRA")
        if lora.config.get("modules_to_save"):
            raise _no_lora("this one has modules that learnt whole")
        ranks = {lora.rank(module) for module in lora.modules}
        # llama.cpp multiplies by alpha / rank, and by 1 where alpha is 0: B has the scale already.
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()) if len(ranks) == 1 else 0.0)
        for module in lora.modules:
            name = f"{module}.weight"
            a, b = lora.update(module)
            gguf_name = layout.gguf_name(name)
            writer.add_tensor(f"{gguf_name}.lora_a", a.float().numpy())
            writer.add_tensor(f"{gguf_name}.lora_b", layout.permute_rotary(name, b.float(), inverse=False).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def load_over_base(base_model: Path, path: Path, **load_options: Any) -> PreTrainedModel:
    """Load the base in 16 bits or more with the adapter of a file added to its weights, as llama.cpp computes it."""
    layout, loaded = Layout.from_folder(base_model), loading.load_base(base_model, **load_options)
    stored = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in gguf.GGUFReader(path).tensors}
    for name, parameter in loaded.named_parameters():
        if parameter.dim() != 2 or f"{layout.gguf_name(name)}.lora_a" not in stored:
            continue
        a, b = (stored[f"{layout.gguf_name(name)}.lora_{letter}"] for letter in "ab")
        update = layout.permute_rotary(name, b, inverse=True) @ a
        with torch.no_grad():
            parameter.add_(update.to(parameter))
    return loaded


def _no_lora(reason: str) -> UsageError:
    return UsageError(
        f"merge.exports: gguf-lora holds two matrices for a layer, and {reason}; leave gguf-lora out and export the "
        "merged model"
    )
