"""Prefix tuning: keys and values of a few virtual tokens learn in each layer (Li and Liang, arXiv 2101.00190).

PEFT's model computes it: its forward pass puts keys and values into the cache that the layers read.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import PreTrainedModel

from components.train_qlora.methods.without_matrices import WithVirtualTokens
from qlora_retrain.core.errors import UsageError

_BASE_NAME = "base_nf4"  # in adapter_config.json, in place of a path of this machine


class Prefix(WithVirtualTokens):
    """Rows are padded, since packed attention has no cache."""

    def attach(self, model: PreTrainedModel) -> Any:
        """Attach random keys and values, in fp32."""
        config = PrefixTuningConfig(num_virtual_tokens=self.num_virtual_tokens, task_type="CAUSAL_LM")
        peft_model = get_peft_model(model, config)
        peft_model.peft_config["default"].base_model_name_or_path = _BASE_NAME
        try:
            with torch.no_grad():
                peft_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UsageError(
                f"train.method: prefix: PEFT's keys and values do not fit {type(model).__name__}: {error}; set "
                "train.method: prompt"
            ) from error
        return peft_model
