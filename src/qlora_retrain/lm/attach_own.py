"""Load the adapters that PEFT's modules do not hold: a prompt of virtual tokens, and networks behind the MLPs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.core.safety import read_json
from qlora_retrain.lm import bottleneck, own_adapter, virtual_tokens
from qlora_retrain.lm.adapter_kind import CONFIG_FILE, PROMPT

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach_own(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Put such an adapter over the model, which is changed in place; return it in evaluation mode.

    Raises:
        UsageError: If it does not fit this base.
        IntegrityError: If a file is damaged.
    """
    config = read_json(adapter / CONFIG_FILE, adapter.name)
    try:
        if config["peft_type"] == PROMPT:
            virtual_tokens.attach(model, config)
        else:
            bottleneck.attach(model, int(config["rank"]))
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{adapter.name}/{CONFIG_FILE}: lacks a setting, or has a wrong one: {error}") from error
    own_adapter.load_weights(model, adapter)
    return model.eval()


def detach(model: Any) -> None:
    """Remove the adapters over a base, PEFT's or ours, which leaves the base as it was."""
    if hasattr(model, "peft_config"):
        # A prefix changes no layer.
        if not model.active_peft_config.is_prompt_learning:
            model.unload()
        return
    adapter = own_adapter.find(model)
    if adapter is not None and adapter.config["peft_type"] == PROMPT:
        virtual_tokens.detach(model)
    elif adapter is not None:
        bottleneck.detach(model)
