"""Say what kind of adapter a folder holds, by PEFT's name for it in adapter_config.json.

A product of matrices (LORA) can be cut, weakened and merged; learnt scales (IA3) can be merged. All others are no
change of a weight: a version has such an adapter alone, and who uses it needs the base.
"""

from __future__ import annotations

from pathlib import Path

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.core.safety import read_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
LORA, IA3, PROMPT, PREFIX = "LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING"
BOTTLENECK = "BOTTLENECK"  # no name of PEFT's, which has no such adapter
_MERGED_KINDS = (LORA, IA3)


def adapter_kind(adapter: Path) -> str | None:
    """Return the kind of an adapter; None where the folder holds a whole model, since all weights trained.

    Raises:
        UsageError: If the folder holds neither.
        IntegrityError: If adapter_config.json names no kind.
    """
    if (adapter / "config.json").is_file():
        return None
    if not (adapter / CONFIG_FILE).is_file():
        raise UsageError(f"{adapter.name}: no {CONFIG_FILE}; `train_qlora` makes such a folder")
    document = read_json(adapter / CONFIG_FILE, adapter.name)
    kind = document.get("peft_type") if isinstance(document, dict) else None
    if not isinstance(kind, str):
        raise IntegrityError(f"{adapter.name}: {CONFIG_FILE} names no peft_type, so nothing says what the adapter is")
    return kind


def ships_alone(adapter: Path) -> bool:
    """Return whether the adapter cannot become a part of the base's weights."""
    return adapter_kind(adapter) not in (None, *_MERGED_KINDS)


def has_matrices(adapter: Path) -> bool:
    """Return whether the adapter is a product of two matrices for each layer, which can be cut and weakened."""
    return adapter_kind(adapter) == LORA


def has_whole_modules(adapter: Path) -> bool:
    """Return whether modules of the base learnt whole beside the adapter (`train.modules_to_save`)."""
    return bool(read_json(adapter / CONFIG_FILE, adapter.name).get("modules_to_save"))
