"""Check a model folder before it is loaded: whether its files fit each other, and which attention its family has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_retrain.core import progress
from qlora_retrain.core.errors import IntegrityError, Problem, UsageError
from qlora_retrain.lm import declared_size, model_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def refuse_unfit(folder: Path, attn_implementation: str) -> str:
    """Refuse a folder whose files do not fit each other; return the attention that its family has."""
    from safetensors import SafetensorError

    # transformers would make its own choice among several candidates, and other readers another.
    paths = model_files.weight_paths(folder, f"{folder.name}: cannot be loaded")
    try:
        config = declared_size.read_config(folder, folder.name)
        # A model that this project packed was checked before, and its files have other shapes.
        if getattr(config, "quantization_config", None) is None:
            declared_size.refuse_unfit(config, paths, folder.name)
        return _supported_attention(folder, config, attn_implementation)
    except Problem:
        raise
    except SafetensorError as error:
        raise IntegrityError(f"{folder.name}: its weights are damaged: {error}") from error
    # A model class raises whatever it likes about a config.json that is not its family's.
    except Exception as error:
        raise UsageError(
            f"{folder.name}: cannot be loaded as a causal language model: {type(error).__name__}: {error}"
        ) from error


def _supported_attention(folder: Path, config: PreTrainedConfig, attn_implementation: str) -> str:
    """Return the implementation to load with; eager computes the same where a family has no other, as Gemma 2."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if attn_implementation != "sdpa":
        return attn_implementation
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None or model_class._supports_sdpa:
        return attn_implementation
    progress.say(f"{folder.name}: {model_class.__name__} has no sdpa attention, so it computes with eager attention")
    return "eager"
