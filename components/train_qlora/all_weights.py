"""Prepare a model all of whose weights train (`train.method: full`), and save and load its weights.

Linear layers, norms, embeddings and the output layer learn; a weight that embeddings and output layer share is one.
Linear layers are torch's own here: autograd keeps their inputs for the gradients of their weights. Packed rows, the
chunked loss, norms and MLPs are those of the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from components.train_qlora.logits import logits_kind
from components.train_qlora.memory_efficient import patch_norms_and_mlps
from components.train_qlora.row_probe import probe_rows
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core import progress
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import base_formats, model_files
from qlora_retrain.lm.weight_files import TensorSpec, write_safetensors

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_SHARD_GIB = 5.0
# Of a loaded model's config: a path of this machine, and what holds for this process.
_OWN_ENTRIES = ("_name_or_path", "_attn_implementation", "attn_implementation", "return_dict")


def refuse_packed(base_nf4: Path) -> None:
    """Raise `UsageError` for a base that is not stored in 16 bits; codes have no gradients."""
    base_format = base_formats.from_folder(base_nf4)
    if base_format.is_packed:
        raise UsageError(
            f"train.method: full trains the base's own weights, and base_nf4 has {base_format.bits_per_weight:.3g} "
            "bits a weight; set quantize.format: none, or train.method: lora"
        )


def prepare(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """Let every weight of a 16-bit base train; its outputs stay the same.

    Raises:
        UsageError: If the model does not compute each row alone.
    """
    model.requires_grad_(True)
    if config.kernels == "liger":
        progress.say(
            "train.kernels: liger's norms have frozen weights; torch's operations are used, as all weights train"
        )
    patch_norms_and_mlps(model.eval(), "torch")
    logits_kind(model)
    probe_rows(model)
    return model


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the trained weights by name, those of the model itself; one that two layers share has one name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def set_weights(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into the model, in its own precision."""
    for name, weight in weights(model).items():
        weight.copy_(tensors[name])


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights as they are trained, for a checkpoint, with a config.json."""
    save_tensors({name: weight.contiguous() for name, weight in weights(model).items()}, folder)
    _write_config(model, folder, str(model.dtype).removeprefix("torch."))


def save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights to the file that `save` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def export(model: PreTrainedModel, folder: Path) -> None:
    """Write the model as transformers loads it: bf16 weights in shards, one in memory at a time, and config.json."""
    shared_names = {name for name, _ in model.named_parameters(remove_duplicate=False)} - weights(model).keys()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in shared_names}

    def in_16_bits(name: str) -> Tensor:
        tensor = tensors[name].detach()
        return tensor.to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)

    specs = [
        TensorSpec(name, torch.bfloat16 if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    write_safetensors(folder, specs, in_16_bits, _SHARD_GIB)
    _write_config(model, folder, "bfloat16")


def _write_config(model: PreTrainedModel, folder: Path, dtype: str) -> None:
    document = {name: value for name, value in model.config.to_dict().items() if name not in _OWN_ENTRIES}
    model_files.write_config(document, dtype, folder)
