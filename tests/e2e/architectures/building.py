"""Write tiny random models of any architecture, beside a tokenizer with a ChatML template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.conftest import write_tiny_tokenizer
from tests.e2e.architectures.catalogue import Architecture

# With transformers' own 0.02 the layers would hardly change what passes through them.
MATRIX_STD, VECTOR_STD = 0.15, 0.1


def write_model(item: Architecture, folder: Path, tokenizer: Path | None = None) -> None:
    """Write a model folder as people publish it: bf16 weights with the names of published files.

    Args:
        item: The architecture.
        folder: An empty folder.
        tokenizer: A folder with the files of `write_tiny_tokenizer`, where there is one already.
    """
    if tokenizer is None:
        write_tiny_tokenizer(folder)
    else:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)

    config = transformers.AutoConfig.for_model(item.model_type, **item.settings)
    if not item.has_weights:
        config.save_pretrained(folder)
        document = json.loads((folder / "config.json").read_text())
        document["architectures"] = [item.name]
        (folder / "config.json").write_text(json.dumps(document))
        return

    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    if item.file_prefix:
        path = folder / "model.safetensors"
        weights = {name.removeprefix(item.file_prefix): tensor for name, tensor in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Draw every weight, also those that begin as ones or zeros, so that none is without effect."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * MATRIX_STD)
        else:
            parameter.add_(noise * VECTOR_STD)
